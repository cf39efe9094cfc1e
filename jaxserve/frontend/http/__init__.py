"""The HTTP door: OpenAI's routes, health, metrics and a page, over the engine of the gRPC door."""
