"""A robot arm in a simulator: picking and placing is new to it, drawers, doors and windows are not."""
