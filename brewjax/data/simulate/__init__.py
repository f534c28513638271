"""Simulated data with a known truth: a professional network of members, jobs, posts and ties, built on ESCO."""
