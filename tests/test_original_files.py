"""The stand-ins for released files that times and memory are measured with."""

from benchmarks.original_files import write
from hack_pipelines import HackVARPipeline

from .released import RELEASED_BSQ


def test_stand_ins_convert_and_draw(tmp_path):
    t5 = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 2000}
    bits = RELEASED_BSQ["d32"][0]
    write(tmp_path, (2, 128, 1, 256, 1, bits, 1), (bits, (32, 32, 32, 32, 32)), t5)
    files = (tmp_path / name for name in ("infinity_2b_reg.pth", "infinity_vae_d32reg.pth"))
    pipe = HackVARPipeline.from_original(*files, text_encoder=tmp_path / "flan-t5-xl")
    out = pipe("a red apple", kv_budget=0.3, scale_schedule=[(1, 1), (2, 2), (4, 4)])
    assert out.images[0].size == (64, 64)
