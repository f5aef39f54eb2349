"""The offline trainer: pictures to CLS features to one module file per task."""
