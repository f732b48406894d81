"""Brute-force versions of published KV cache methods, written from the papers and the authors' released code.

They share nothing with the package: plain NumPy arrays in float64, loops instead of kernels, one prompt at a time.
`tests/goldens` holds them against numbers that the authors' own functions returned.

Terms: `attention[h, i, j]` is the weight after softmax from query `i` to key `j`, causal; `keep` is the number of
entries of one KV head after compression; positions are sorted lists. A docstring says what comes from the paper, what
from the released code (file and name) and where the two differ.
"""
