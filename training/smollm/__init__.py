"""How `reader-30` is trained: SmolLM2 learns to read pages through the vision tower of the small reader.

`python -m training.smollm.train` trains and resumes, `python -m training.smollm.export` writes the file that ships, and
`python -m training.smollm.evaluate` measures the installed model.
"""
