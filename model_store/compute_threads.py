"""How many compute threads torch starts from a thread of ours."""

import threading

import torch


def use_one_compute_thread() -> None:
    """Let this thread compute by itself, while all others stay as they are.

    Two threads that each start as many compute threads as there are cores wait for one another at the end of
    every small product: on a busy machine a registration then takes ten times as long.
    """
    default = torch.get_num_threads()
    torch.set_num_threads(1)
    # The call also set what threads begin with that have not computed yet; only this one was meant.
    restoring = threading.Thread(target=torch.set_num_threads, args=(default,))
    restoring.start()
    restoring.join()
