"""Answers: token events in the form of the OpenAI API, as chunks of a stream or as one answer."""
