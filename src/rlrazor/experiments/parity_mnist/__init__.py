"""ParityMNIST: the forgetting law on a small MLP (RL's Razor, arXiv:2509.04259, appendix B.3)."""
