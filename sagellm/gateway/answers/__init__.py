"""What is sent back: token events as the chunks and answers of the OpenAI API."""
