"""Models behind an HTTP server: of each next-token distribution only the likeliest tokens are known."""
