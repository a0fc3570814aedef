"""Models behind an HTTP server, or llama.cpp: of each next-token distribution the likeliest tokens are asked for."""

SCHEMES = ("http://", "https://")
LLAMA = "llama.cpp:"  # in front of a GGUF file that llama.cpp itself computes with


def is_served(source: object) -> bool:
    """Whether what names a model is the address of a server, or a file for llama.cpp."""
    return str(source).lower().startswith((*SCHEMES, LLAMA))
