"""The server: an HTTP API of OpenAI's shape over one engine."""
