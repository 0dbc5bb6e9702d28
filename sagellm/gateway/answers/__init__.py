"""Answers: token events as the chunks and the answers of the OpenAI API."""
