"""Accuracy at a budget: tasks, metrics, resumable runs, reports, and the papers' analyses of attention."""
