"""What goes over HTTP: the bodies of requests and answers, one module a resource.

Their descriptions and examples are those of the OpenAPI document.
"""
