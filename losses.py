"""One function per published loss: tensors in, a scalar out. Everything is computed in float32, also under autocast.

Under torchrun every loss is scaled so that the mean of its gradients over the processes, which DDP forms, equals
the gradient of one process that sees the joint batch.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F

from kernels import upsample_cross_entropy

IGNORE = 255


def mean_over_ranks(value):
    """The mean of a tensor over all processes, without gradient; the tensor itself where there is one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.detach().clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def cross_entropy(logits, label, weight=None):
    """Cross-entropy with the convention of the DAFormer family: summed over the valid pixels, over the number of *all*.

    logits: float (B,K,h,w), upsampled on the way; label: uint8 (B,H,W), 255 ignored; weight: float (B,H,W) or None.
    F.cross_entropy would divide by the number of valid pixels (so in the released code of DAFormer).
    """
    return upsample_cross_entropy(logits, label, weight, IGNORE)


def feature_distance(features, reference, label, things):
    """Thing-class feature distance (DAFormer, Hoyer et al., 2022): mean L2 norm of f - f_ImageNet over thing cells.

    features, reference: float (B,C,h,w), the last stage of the student and of the frozen ImageNet network;
    label: int (B,h,w), 255 where no class has the majority; things: class indices. A grid without a thing cell gives 0
    with a graph, where the reference code gives NaN (and, summed into one backward, would lose the step).
    """
    keep = torch.isin(label, torch.tensor(things, device=label.device))
    distance = torch.linalg.vector_norm(features.float() - reference.float(), dim=1)  # (B,C,h,w) -> (B,h,w)
    count = mean_over_ranks(keep.sum().float())
    return (distance * keep).sum() / count.clamp(min=1e-6)
