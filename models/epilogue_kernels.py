"""The epilogues of `models/epilogues.py` for Hopper, in quack's language of them.

Tiles are chosen here and not by timing, which would take a minute and differ from run to run. On an
H200, over the shapes of the 160M and 600M models, 128 x 128 with two consumers in turn (ping-pong)
was the fastest or within 3% of it, but for long sums, which two consumers do better together on
128 x 256. SwiGLU's backward pass, whose epilogue moves five numbers for each of the product, is
fastest with 64 rows a consumer: 1.51 ms against 1.68 with 128 and 2.1-3.0 with more (160M). A pair
of neighbours shares its tile of the weight (clusters of two).
"""

import torch
from quack.activation import dswiglu
from quack.activation import swiglu as swiglu_of
from quack.epilogue import gemm_epilogue, pack, unpack
from quack.gemm_config import GemmConfig
from torch import Tensor

LONG_SUM = 2048  # inputs; above it the larger tile


def _tiles(rows: int, columns: int, pingpong: bool) -> GemmConfig:
    return GemmConfig(
        tile_m=rows,
        tile_n=columns,
        pingpong=pingpong,
        cluster_m=2,
        cluster_n=1,
        is_dynamic_persistent=False,
        device_capacity=9,
    )


SMALL, LARGE = _tiles(128, 128, pingpong=True), _tiles(128, 256, pingpong=False)
WIDE = _tiles(64, 256, pingpong=True)
LOGITS = _tiles(128, 192, pingpong=True)  # 0.57 ms for 8,192 tokens at 160M, cuBLAS 0.67


@gemm_epilogue()
def _plain(acc):
    return {"D": acc}


@gemm_epilogue()
def _added(acc, c):
    return {"D": acc + c}


@gemm_epilogue(outputs=("product",), mode="acc_pair")
def _swiglu(acc):
    gate, up = unpack(acc)
    return {"D": pack(gate, up), "product": swiglu_of(gate, up)}


@gemm_epilogue(outputs=("product",), mode="packed_cd_b16x2")
def _swiglu_gradient(acc, c):
    gate, up = unpack(c)
    to_gate, to_up, product = dswiglu(gate, up, acc)
    return {"D": pack(to_gate, to_up), "product": product}


def product(a: Tensor, b: Tensor, added: Tensor | None) -> Tensor:
    tiles = LARGE if a.shape[1] > LONG_SUM else SMALL
    if added is None:
        return _plain(a, b, config=tiles, tuned=False)["D"]
    return _added(a, b, added, config=tiles, tuned=False)["D"]


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    return _plain(a, b, out_dtype=torch.float32, config=LOGITS, tuned=False)["D"]


def swiglu(x: Tensor, weight: Tensor, halves: bool) -> tuple[Tensor | None, Tensor]:
    results = _swiglu(x, weight, store_d=halves, config=SMALL, tuned=False)
    return results.get("D"), results["product"]


def swiglu_gradient(grad: Tensor, weight: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    # Each tile of gate_up is read before its gradient is written there, and by nobody else.
    results = _swiglu_gradient(grad, weight, gate_up, out={"D": gate_up}, config=WIDE, tuned=False)
    return results["product"], gate_up
