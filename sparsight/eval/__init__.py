"""Accuracy at a budget: tasks, metrics, runs that can be stopped and resumed, reports, and the papers' analyses."""
