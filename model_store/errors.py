"""Every fault this project names, under one root.

    ToscaError
    ├── InvalidModule            a module file that must not be used
    │   ├── FingerprintMismatch  made for another backbone
    │   ├── GoldenCheckFailed    does not reproduce its trainer's outputs here
    │   └── UntrustedModule      lacks the signature that is required
    ├── InvalidTrust             a key or list of signers that cannot be used
    ├── InvalidImage             bytes that are no picture we can read
    │   ├── UnsupportedImageFormat
    │   └── ImageTooLarge
    ├── InvalidBackbone          a model, checkpoint or artefact that cannot serve as backbone
    ├── InvalidDataset           a training source that cannot be used
    ├── InvalidRequest           a question that cannot be answered as put
    ├── NotFound
    │   ├── UnknownTask
    │   ├── UnknownRevision
    │   ├── UnknownModule
    │   └── UnknownBackbone
    ├── Conflict                 the store moved on, or its state forbids the change
    │   └── HarmsOtherTasks      the impact report exceeds the margin
    ├── CorruptStore             stored bytes do not match their digest or cannot be read
    ├── StoreUnavailable         the store cannot be reached
    └── HubUnavailable           a repository of a hub cannot be read or written as asked

The service maps them to HTTP statuses in one table (`service/problems.py`); the command line prints
the message and exits with status 1.
"""


class ToscaError(Exception):
    """Root of all faults that are the world's and not ours."""


class InvalidModule(ToscaError):
    pass


class FingerprintMismatch(InvalidModule):
    pass


class GoldenCheckFailed(InvalidModule):
    pass


class UntrustedModule(InvalidModule):
    pass


class InvalidTrust(ToscaError):
    pass


class InvalidImage(ToscaError):
    pass


class UnsupportedImageFormat(InvalidImage):
    pass


class ImageTooLarge(InvalidImage):
    pass


class InvalidBackbone(ToscaError):
    pass


class InvalidDataset(ToscaError):
    pass


class InvalidRequest(ToscaError):
    pass


class NotFound(ToscaError):
    pass


class UnknownTask(NotFound):
    pass


class UnknownRevision(NotFound):
    pass


class UnknownModule(NotFound):
    pass


class UnknownBackbone(NotFound):
    pass


class Conflict(ToscaError):
    pass


class HarmsOtherTasks(Conflict):
    pass


class CorruptStore(ToscaError):
    pass


class StoreUnavailable(ToscaError):
    pass


class HubUnavailable(ToscaError):
    pass
