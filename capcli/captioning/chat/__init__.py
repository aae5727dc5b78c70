"""The client of OpenAI-compatible servers: requests for chat completions, with limits, retries and parsed answers."""
