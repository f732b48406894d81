"""Measurements that the documentation quotes, with their committed results."""
