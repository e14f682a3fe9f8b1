"""
Count the operations of a step: FLOPs, and bytes read and written.
"""
import torch
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def product_flops(_, a, b, *, out_val, **__):
    return flop_counter.bmm_flop(a, b, out_val=out_val)


def attention_flops(query, key, value, *_, **__):
    return flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape)


def attention_backward_flops(grad, query, key, value, *_, **__):
    return flop_counter.sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FLOPS = {**flop_counter.flop_registry,  # PyTorch's counter does not know these three
         aten.baddbmm_: product_flops,
         aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
         aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops}
MOVE_NOTHING = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view}


class OperationCounter(TorchDispatchMode):
    """
    A context that counts PyTorch's operations within it.
    flops: of matrix products and attention; the masked part of an attention counts as well.
    bytes: of the tensors that operations read and write, as if no cache kept any. Views are free.
    """
    flops = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = func._overloadpacket
        if operation in FLOPS:
            self.flops += FLOPS[operation](*args, **kwargs, out_val=out)
        if not func.is_view and operation not in MOVE_NOTHING:
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs, out)):
                if isinstance(tensor, torch.Tensor):
                    self.bytes += tensor.numel() * tensor.element_size()
        return out
