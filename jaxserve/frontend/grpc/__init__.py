"""The gRPC door: server, servicers, and the one table from errors to status codes."""
