"""The HTTP service: one backbone on one device, task modules hot-loaded from a model store."""
