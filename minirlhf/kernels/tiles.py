"""How large the tiles of logits are that the fused head holds at a time.

On a CPU 16 MiB of fp32: about what its last cache holds between the product that writes a tile and the kernel that
reads it, and more work between two waits for the slower thread than smaller tiles give. On a GPU 32 MiB of bf16, which
an H100's second cache (50 MB) holds, and no more than a 32nd of all logits: that and the sums in fp32 stay below the
16th of N·V fp32 numbers that is promised. Policy and reference share them. `python benchmarks/op_gpu.py --tiles`
measures other sizes.
"""

TILE_ROWS = {"cpu": 2048, "cuda": 8192}
TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 24}
TILE_SHARE, TILE_LEAST = 32, 1 << 18  # on a GPU: of all logits, but at least so many elements
