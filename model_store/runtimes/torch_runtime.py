"""Torch: the model itself, and on CUDA its captured graphs."""
# B batch, C channels, H height, W width, N tokens, D features

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from model_store.preprocess import Preprocessing
from model_store.runtimes.byte_patches import BytePatches, byte_patches, cut_patches
from model_store.runtimes.cls_block import for_cls_alone
from model_store.runtimes.quick_gelu import silu_for_quick_gelu

_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CUDA_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
_WARM_UP_PASSES = 3


class Embedding(nn.Module):
    """A timm model with the normalisation before it, unless it reads bytes, and the choice of the CLS token
    after it."""

    scale_C11: Tensor
    shift_C11: Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, precision: str = "float32") -> None:
        super().__init__()
        self.model = model
        self.image_size = preprocessing.height, preprocessing.width
        self._dtype = _DTYPE[precision]
        # timm's models share this method, but torch's types know nothing of it.
        self._forward_features: Callable[[Tensor], Tensor] = cast(Any, model).forward_features
        mean_C11 = torch.tensor(preprocessing.mean).view(-1, 1, 1)
        std_C11 = torch.tensor(preprocessing.std).view(-1, 1, 1)
        patch_embed = getattr(model, "patch_embed", None)
        self._num_patch_bytes = patch_embed.num_bytes if isinstance(patch_embed, BytePatches) else None
        model.to(self._dtype)
        self.register_buffer("scale_C11", 1.0 / (255.0 * std_C11), persistent=False)
        self.register_buffer("shift_C11", mean_C11 / std_C11, persistent=False)

    def prepare(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] uint8 pixels as `forward` wants them: in patches where the model reads bytes, else
        channel by channel."""
        if self._num_patch_bytes is None:
            return pixels_BCHW.contiguous()
        return cut_patches(pixels_BCHW, self._num_patch_bytes)

    def forward(self, prepared: Tensor) -> Tensor:
        if self._num_patch_bytes is None:
            prepared = prepared.float() * self.scale_C11 - self.shift_C11
        tokens_BND = self._forward_features(prepared.to(self._dtype))
        return tokens_BND[:, 0].float()


class TorchRuntime:
    """The model run as it is, on any device."""

    batch_buckets: tuple[int, ...] = ()

    def __init__(self, embedding: Embedding, device: torch.device) -> None:
        self.device = device
        self._embedding = embedding.to(device).eval()

    @torch.inference_mode()
    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        pixels_BCHW = pixels_BCHW.to(self.device, non_blocking=True)
        cls_BD: Tensor = self._embedding(self._embedding.prepare(pixels_BCHW))
        return cls_BD


class CudaGraphRuntime:
    """The model as CUDA graphs, one a batch bucket: a pass is one launch instead of hundreds.

    A batch is padded to the smallest bucket that holds it, and cut where it exceeds the largest. Pixels
    travel through pinned memory, so that the copy runs beside the host. All graphs share one memory pool,
    because they never run at the same time.
    """

    def __init__(
        self,
        embedding: Embedding,
        device: torch.device,
        batch_buckets: tuple[int, ...] = CUDA_BUCKETS,
    ) -> None:
        self.device = device
        self.batch_buckets = batch_buckets
        self._embedding = embedding.to(device).eval()
        height, width = embedding.image_size
        largest = (batch_buckets[-1], height, width, 3)  # as pictures lie in memory
        staging_BHWC = torch.zeros(largest, dtype=torch.uint8, pin_memory=True)
        self._staging_BCHW = staging_BHWC.permute(0, 3, 1, 2)
        self._input_BCHW = torch.zeros(largest, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        self._staged = torch.cuda.Event()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        with torch.inference_mode():
            for bucket in reversed(batch_buckets):  # the largest first, so that its pool serves them all
                self._graphs[bucket] = self._capture(bucket)

    def _capture(self, bucket: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        pixels_BCHW = self._input_BCHW[:bucket]
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # libraries allocate and choose kernels before the capture
            for _ in range(_WARM_UP_PASSES):
                self._embedding(self._embedding.prepare(pixels_BCHW))
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            cls_BD = self._embedding(self._embedding.prepare(pixels_BCHW))
        return graph, cls_BD

    @torch.inference_mode()
    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        return torch.cat([self._replay(chunk) for chunk in pixels_BCHW.split(self.batch_buckets[-1])])

    def _replay(self, pixels_BCHW: Tensor) -> Tensor:
        num = len(pixels_BCHW)
        bucket = next(one for one in self.batch_buckets if one >= num)
        self._staged.synchronize()  # the pass before may still be reading the pinned pixels
        self._staging_BCHW[:num].copy_(pixels_BCHW)
        self._input_BCHW[:num].copy_(self._staging_BCHW[:num], non_blocking=True)
        self._staged.record()
        graph, cls_BD = self._graphs[bucket]
        graph.replay()
        return cls_BD[:num].clone()  # the next replay overwrites the graph's own output


def load_torch(
    model: nn.Module, preprocessing: Preprocessing, precision: str, device: torch.device
) -> TorchRuntime | CudaGraphRuntime:
    """The model on its device: on CUDA as graphs, for the CLS token alone, with one kernel an activation; in
    bfloat16 reading bytes. On the CPU in float32 it stays as it is, since all others are compared with it
    there."""
    if precision != "float32":
        model = byte_patches(model, preprocessing)
    if device.type == "cuda":
        embedding = Embedding(for_cls_alone(silu_for_quick_gelu(model)), preprocessing, precision)
        with torch.cuda.device(device):
            return CudaGraphRuntime(embedding, device)
    return TorchRuntime(Embedding(model, preprocessing, precision), device)
