"""The Open Inference Protocol (v2) that KServe, Triton and MLServer clients speak, over HTTP and gRPC.

Both transports become one `InferenceRequest`, which is answered as `POST /predict` is: by the engine, with
the same admission, limits and deadlines.
"""
