"""The updates of rows in plain PyTorch: for devices without a fused pass, to catch rows up, and as
the oracle of the fused passes."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 65536  # rows, where all rows are worked on


def row_adamw_(
    param: Tensor,  # [C, d]
    exp_avg: Tensor,  # [C, d]
    exp_avg_sq: Tensor,  # [C, d], or [C]
    row_step: Tensor,  # [C] int32
    log_decay: Tensor,  # [C] float64
    ids: Tensor,  # [n], any order; rows of repeated ids add up
    rows: Tensor,  # [n, d]
    total_log_decay: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
) -> None:
    ids, gradient = _merged(ids, rows)
    gradient = -gradient if maximize else gradient
    row_step[ids] += 1
    steps = row_step[ids].double()
    decay = (total_log_decay - log_decay[ids]).exp()
    log_decay[ids] = total_log_decay

    first = exp_avg[ids].to(gradient).lerp(gradient, 1 - beta1)
    square = gradient * gradient
    if exp_avg_sq.dim() == 1:
        square = square.mean(dim=1)
    second = exp_avg_sq[ids].to(gradient).mul(beta2).add(square, alpha=1 - beta2)
    step_size = _column(lr / (1 - beta1**steps)).to(gradient)
    root_gain = _column((1 - beta2**steps).rsqrt()).to(gradient)
    root = second.sqrt() if second.dim() == 2 else second.sqrt().unsqueeze(1)
    moved = param[ids].to(gradient) * _column(decay).to(gradient)
    moved = moved - step_size * first / (root * root_gain + eps)

    param[ids] = moved.to(param.dtype)
    if exp_avg.dtype == torch.bfloat16:
        bits = rounding_bits(ids, row_step[ids], param.shape[1])
        exp_avg[ids] = round_to_bf16(first, bits & 0xFFFF)
        if exp_avg_sq.dim() == 2:
            second = round_to_bf16(second, bits >> 16)
    else:
        exp_avg[ids] = first
    exp_avg_sq[ids] = second


def row_sgd_(
    param: Tensor,  # [C, d]
    momentum_buffer: Tensor | None,  # [C, d]
    log_decay: Tensor | None,  # [C] float64: lazy
    last_step: Tensor | None,  # [C] int32: exact
    history: Tensor | None,  # [steps, 4] float64
    ids: Tensor,  # [n], any order; rows of repeated ids add up
    rows: Tensor,  # [n, d]
    decay_before: float,
    decay_after: float,
    step: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    ids, gradient = _merged(ids, rows)
    gradient = -gradient if maximize else gradient
    p = param[ids].to(gradient)
    b = torch.zeros_like(p) if momentum_buffer is None else momentum_buffer[ids]
    if last_step is not None and history is not None:
        missed = missed_transitions(history).to(param.device)[step - 1 - last_step[ids].long()]
        p, b = _transformed(p, b, missed)
        last_step[ids] = step
    elif log_decay is not None:
        p = p * _column((decay_before - log_decay[ids]).exp()).to(p)
        log_decay[ids] = decay_after
    slope = gradient + weight_decay * p
    moved = momentum * b + slope
    p = p - lr * (slope + momentum * moved if nesterov else moved)
    param[ids] = p.to(param.dtype)
    if momentum_buffer is not None:
        momentum_buffer[ids] = moved if momentum else b  # without momentum it is left alone


def sgd_transition(lr: float, momentum: float, weight_decay: float, nesterov: bool) -> Tensor:
    """[2, 2] float64: what a step with gradient zero does to (parameter, buffer)."""
    if nesterov:
        to_parameter = [1 - lr * weight_decay * (1 + momentum), -lr * momentum**2]
    else:
        to_parameter = [1 - lr * weight_decay, -lr * momentum]
    to_buffer = [weight_decay, momentum] if momentum else [0.0, 1.0]
    return torch.tensor([to_parameter, to_buffer], dtype=torch.float64)


def missed_transitions(history: Tensor) -> Tensor:
    """[steps, 4], oldest first -> [steps + 1, 2, 2], of missing the last 0, 1, ... steps; on the
    host."""
    missed = [torch.eye(2, dtype=torch.float64)]
    for step in history.cpu().view(-1, 2, 2).flip(0):
        missed.append(missed[-1] @ step)
    return torch.stack(missed)


def apply_transitions_(param: Tensor, buffer: Tensor | None, transitions: Tensor) -> None:
    """Row i of param and buffer [C, d] (no buffer: zeros) goes through transitions[i] [2, 2]."""
    for begin in range(0, len(param), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        p = param[part].to(torch.promote_types(param.dtype, torch.float32))
        b = torch.zeros_like(p) if buffer is None else buffer[part]
        p, b = _transformed(p, b, transitions[part])
        param[part] = p.to(param.dtype)
        if buffer is not None:
            buffer[part] = b


def scale_rows_(param: Tensor, factor: Tensor) -> None:
    """Multiply row i of param [C, d] by factor[i]."""
    param.mul_(_column(factor).to(torch.promote_types(param.dtype, torch.float32)))


def rounding_bits(row: Tensor, step: Tensor, dim: int) -> Tensor:
    """The 32 random bits of each row [n] after its step [n], for every column: [n, dim] int64."""
    key = _mix64(_mix64_key(row, step)) & 0xFFFFFFFF
    column = torch.arange(dim, device=row.device)
    x = (column * 0x9E3779B9 + key.unsqueeze(1)) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def round_to_bf16(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 to bf16, up or down by the sixteen random bits of each."""
    words = values.contiguous().view(torch.int32)
    rounded = ((words + bits.to(torch.int32)) >> 16 << 16).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def _mix64_key(row: Tensor, step: Tensor) -> Tensor:
    return (row.long() ^ step.long()) + _signed(0x9E3779B97F4A7C15)


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _transformed(p: Tensor, b: Tensor, transitions: Tensor) -> tuple[Tensor, Tensor]:
    a = transitions.to(p).unsqueeze(-1)  # [n, 2, 2, 1]
    return a[:, 0, 0] * p + a[:, 0, 1] * b, a[:, 1, 0] * p + a[:, 1, 1] * b


def _merged(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ascending ids and their summed rows, in the type of the arithmetic."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    ids, position = ids.unique(return_inverse=True)
    return ids, rows.new_zeros(len(ids), rows.shape[1]).index_add_(0, position, rows)


def _column(values: Tensor) -> Tensor:
    return values.unsqueeze(1)
