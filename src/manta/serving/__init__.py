"""Models behind OpenAI's API: an engine that batches token by token, the API over it, Ray Serve around both."""
