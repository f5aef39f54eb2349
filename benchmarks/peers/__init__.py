"""Other ways to serve the same backbone and bank, written as well as each allows; only for benchmarks.

They run in an environment of their own (`make .tosca/peers/.installed`), apart from the product's.
"""
