"""The texts of `apply_rotary_pos_emb` in Transformers' models, with the properties of each, for known_code.py."""

from __future__ import annotations

from typing import NamedTuple


class Rotary(NamedTuple):
    """(q, k, cos, sin) -> q and k rotated, or one of them: y0 = x0 cos - x1 sin, y1 = x1 cos + x0 sin for each pair."""

    families: str
    text: str
    helper: str = "rotate_half"  # the function that chooses the elements of each pair
    # The contents of a row of cos. "elements": an angle for each element. "first half": the same, but the function
    # uses the first half only. "pairs": an angle for each pair.
    tables: str = "elements"
    promotes: bool = True  # the result's dtype is the one that q and cos promote to. False: that of q
    partial: bool = False  # rows may be narrower than heads, whose other elements are not rotated
    sorted_first: bool = False  # the pairs (2i, 2i + 1) of the input are the pairs (i, i + R/2) of the result
    heads: int | None = None  # the dimension of the heads. None: the argument unsqueeze_dim gives it
    # The arguments, and which tokens they rotate. "rows": (q, k, cos, sin) with a row of the tables for each token.
    # "complex": cos + i sin instead of cos and sin. "complex grid": the same, (S, 1, pairs), for all sequences.
    # "sections": tables of three rows for each token; each element takes its angle from one of them.
    # "x, cos, sin" and "x, sin, cos": q or k alone. "last elements": the same, and the last elements of each head are
    # rotated. "last tokens": q has the last tokens of k. "grid": tables (1, ..., S, R), the same for all sequences.
    # "patches": the same, (S, R), and only the last S tokens are rotated. "memory": as "grid"; k may have the tokens
    # several times, and at the end tokens that are not rotated.
    form: str = "rows"
    # A `Pairing`: that of the helper, if there is one.
    interleaved: bool = True
    inverse: bool = False


class Pairing(NamedTuple):
    """What a helper decides."""

    interleaved: bool  # pairs are (2i, 2i + 1), not (i, i + R/2)
    inverse: bool = False  # y0 = x0 cos + x1 sin, y1 = x1 cos - x0 sin


_UNSQUEEZE = """    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
"""
_REPEAT = """    cos = cos[..., : cos.shape[-1] // 2].repeat_interleave(2, dim=-1)
    sin = sin[..., : sin.shape[-1] // 2].repeat_interleave(2, dim=-1)
"""
_SPLIT = """    rotary_dim = cos.shape[-1]
    q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
    k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
"""
_ROTATE = """    q_embed = q * cos + rotate_half(q) * sin
    k_embed = k * cos + rotate_half(k) * sin
"""
_ROTATE_PART = """    q_embed = q_rot * cos + rotate_half(q_rot) * sin
    k_embed = k_rot * cos + rotate_half(k_rot) * sin
    q_embed = torch.cat([q_embed, q_pass], dim=-1)
    k_embed = torch.cat([k_embed, k_pass], dim=-1)
"""
_SECTIONS = "".join(
    f"    {x} = torch.cat([m[i % 3] for i, m in enumerate({x}.split(mrope_section, dim=-1))], dim=-1)"
    ".unsqueeze(unsqueeze_dim)\n"
    for x in ("cos", "sin")
)
_DEF, _RETURN = "def f(q, k, cos, sin, unsqueeze_dim=1):\n", "    return q_embed, k_embed"
_FLOAT_OUT = "    return q_embed.to({0}), k_embed.to({0})"
_VISION = """def f(q, k, cos, sin):
    orig_q_dtype = q.dtype
    orig_k_dtype = k.dtype
    q, k = q.float(), k.float()
    cos, sin = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
"""
_COMPLEX = """def f(xq, xk, freqs_cis):
    xq_ = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    xk_ = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
"""

ROTARIES = (
    Rotary("llama and most others; blt", _DEF + _UNSQUEEZE + _ROTATE + _RETURN),
    Rotary("olmo, olmo2, olmo3, flex_olmo", _DEF + "    q_type, k_type = q.dtype, k.dtype\n" + _UNSQUEEZE + _ROTATE
           + "    return q_embed.to(q_type), k_embed.to(k_type)", promotes=False),
    Rotary("cohere, cohere2", _DEF + "    dtype = q.dtype\n    q = q.float()\n    k = k.float()\n" + _UNSQUEEZE
           + _ROTATE + _FLOAT_OUT.format("dtype=dtype"), promotes=False),
    Rotary("glm4_moe, gpt_neox, qwen3_next, qwen3_5, minimax_m2, glm4v", _DEF + _UNSQUEEZE + _SPLIT + _ROTATE_PART
           + _RETURN, partial=True),
    Rotary("phi3", _DEF + _UNSQUEEZE + _SPLIT + """
    q_embed = torch.cat([q_rot * cos + rotate_half(q_rot) * sin, q_pass], dim=-1)
    k_embed = torch.cat([k_rot * cos + rotate_half(k_rot) * sin, k_pass], dim=-1)
""" + _RETURN, partial=True),
    Rotary("nemotron", _DEF + _UNSQUEEZE + """    rot_dim = cos.shape[-1]
    q, q_pass = q[..., :rot_dim], q[..., rot_dim:]
    k, k_pass = k[..., :rot_dim], k[..., rot_dim:]
""" + _ROTATE + "    return torch.cat((q_embed, q_pass), dim=-1), torch.cat((k_embed, k_pass), dim=-1)",
           partial=True),
    Rotary("glm, glm4", _DEF + _UNSQUEEZE + _REPEAT + _SPLIT + _ROTATE_PART + _RETURN, tables="first half",
           partial=True),
    Rotary("helium", _DEF + _UNSQUEEZE + _REPEAT + _ROTATE + _RETURN, tables="first half"),
    Rotary("ernie4_5, ernie4_5_moe", _DEF + "    original_dtype = q.dtype\n" + _UNSQUEEZE + _REPEAT + """
    q_embed = q.float() * cos + rotate_half(q).float() * sin
    k_embed = k.float() * cos + rotate_half(k).float() * sin
""" + _FLOAT_OUT.format("original_dtype"), tables="first half", promotes=False),
    Rotary("ernie4_5_vl_moe", _DEF + "    original_dtype = q.dtype\n" + _UNSQUEEZE + """
    q_embed = q.float() * cos + rotate_half(q).float() * sin
    k_embed = k.float() * cos + rotate_half(k).float() * sin
""" + _FLOAT_OUT.format("original_dtype"), promotes=False),
    Rotary("modernbert, modernbert_decoder, esm", _DEF + "    original_dtype = q.dtype\n" + _UNSQUEEZE + """
    q_embed = q.float() * cos + rotate_half(q.float()) * sin
    k_embed = k.float() * cos + rotate_half(k.float()) * sin
""" + _FLOAT_OUT.format("original_dtype"), promotes=False),
    Rotary("hunyuan_vl", _DEF + """    origin_dtype = q.dtype
    q, k = q.float(), k.float()
    cos = cos.unsqueeze(unsqueeze_dim).float()
    sin = sin.unsqueeze(unsqueeze_dim).float()
""" + _ROTATE + _FLOAT_OUT.format("origin_dtype"), promotes=False),
    Rotary("gpt_oss", _DEF + _UNSQUEEZE + """    q_embed = _apply_rotary_emb(q, cos, sin)
    k_embed = _apply_rotary_emb(k, cos, sin)
""" + _RETURN, helper="_apply_rotary_emb", tables="pairs"),
    Rotary("deepseek_v3, longcat_flash, glm4_moe_lite, youtu", """def f(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos[..., : cos.shape[-1] // 2].unsqueeze(unsqueeze_dim)
    sin = sin[..., : sin.shape[-1] // 2].unsqueeze(unsqueeze_dim)
    q1, q2 = q[..., 0::2], q[..., 1::2]
    k1, k2 = k[..., 0::2], k[..., 1::2]
    q_embed = torch.cat([q1 * cos - q2 * sin, q2 * cos + q1 * sin], dim=-1)
    k_embed = torch.cat([k1 * cos - k2 * sin, k2 * cos + k1 * sin], dim=-1)
""" + _RETURN, helper="", tables="first half", sorted_first=True),
    Rotary("mistral_large4", """def f(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos[..., : cos.shape[-1] // 2].unsqueeze(unsqueeze_dim)
    sin = sin[..., : sin.shape[-1] // 2].unsqueeze(unsqueeze_dim)
    q1, q2 = q[..., 0::2], q[..., 1::2]
    q_embed = torch.cat([q1 * cos - q2 * sin, q2 * cos + q1 * sin], dim=-1)
    if k is not None:
        k1, k2 = k[..., 0::2], k[..., 1::2]
        k_embed = torch.cat([k1 * cos - k2 * sin, k2 * cos + k1 * sin], dim=-1)
    else:
        k_embed = None
""" + _RETURN, helper="", tables="first half", sorted_first=True),
    Rotary("deepseek_v3, longcat_flash of Transformers 4", _DEF + _UNSQUEEZE + """    b, h, s, d = q.shape
    q = q.view(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d)
    b, h, s, d = k.shape
    k = k.view(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d)
""" + _ROTATE + _RETURN, sorted_first=True),
    Rotary("llama4", _COMPLEX + """    xq_out = torch.view_as_real(xq_ * freqs_cis[:, :, None, :]).flatten(3)
    xk_out = torch.view_as_real(xk_ * freqs_cis[:, :, None, :]).flatten(3)
    return xq_out.type_as(xq), xk_out.type_as(xk)""", helper="", tables="pairs", promotes=False, heads=2,
           form="complex"),
    Rotary("deepseek_v2", _COMPLEX + """    freqs_cis = freqs_cis.unsqueeze(1).to(xq_.device)
    xq_out = torch.view_as_real(xq_ * freqs_cis).flatten(3).type_as(xq)
    xk_out = torch.view_as_real(xk_ * freqs_cis).flatten(3).type_as(xk)
    return xq_out, xk_out""", helper="", tables="pairs", promotes=False, heads=1, form="complex"),
    Rotary("llama4 (vision tower)", """def f(query, key, freqs_ci):
    query_ = torch.view_as_complex(query.float().reshape(*query.shape[:-1], -1, 2))
    key_ = torch.view_as_complex(key.float().reshape(*key.shape[:-1], -1, 2))
    freqs_ci = reshape_for_broadcast(freqs_ci=freqs_ci, query=query_)
    freqs_ci = freqs_ci.to(query_.device)
    query_out = torch.view_as_real(query_ * freqs_ci).flatten(3)
    key_out = torch.view_as_real(key_ * freqs_ci).flatten(3)
    return query_out.type_as(query), key_out.type_as(key)""", helper="reshape_for_broadcast", tables="pairs",
           promotes=False, heads=2, form="complex grid"),
    Rotary("gptj, codegen", """def f(tensor, sin, cos):
    sin = torch.repeat_interleave(sin[:, :, None, :], 2, 3)
    cos = torch.repeat_interleave(cos[:, :, None, :], 2, 3)
    return tensor * cos + rotate_every_two(tensor) * sin""", helper="rotate_every_two", tables="pairs", heads=2,
           form="x, sin, cos"),
    Rotary("gemma3n, gemma4, gemma4_unified, diffusion_gemma", "def f(x, cos, sin, unsqueeze_dim=1):\n" + _UNSQUEEZE
           + "    return x * cos + rotate_half(x) * sin", form="x, cos, sin"),
    Rotary("qwen2_vl, qwen2_5_vl of Transformers 4", "def f(q, k, cos, sin, mrope_section, unsqueeze_dim=1):\n"
           "    mrope_section = mrope_section * 2\n" + _SECTIONS + _ROTATE + _RETURN, form="sections"),
    Rotary("vision towers: qwen2_vl, qwen2_5_vl, qwen3_vl, glm4v", _VISION + _ROTATE
           + "    q_embed = q_embed.to(orig_q_dtype)\n    k_embed = k_embed.to(orig_k_dtype)\n" + _RETURN,
           promotes=False, heads=-2),
    Rotary("vision towers: inkling2", _VISION + _ROTATE.replace("rotate_half", "rotate_pairwise")
           + "    return q_embed.to(orig_q_dtype), k_embed.to(orig_k_dtype)", helper="rotate_pairwise", promotes=False,
           heads=-2),
    Rotary("vision towers: minimax_m3_vl", """def f(q, k, cos, sin):
    rot_dim = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    q_rot, q_pass = q[..., :rot_dim], q[..., rot_dim:]
    k_rot, k_pass = k[..., :rot_dim], k[..., rot_dim:]
    q_rot = q_rot * cos + rotate_half(q_rot) * sin
    k_rot = k_rot * cos + rotate_half(k_rot) * sin
    return torch.cat([q_rot, q_pass], dim=-1), torch.cat([k_rot, k_pass], dim=-1)""", heads=-2, partial=True),
    Rotary("vision towers: dinov3_vit, eomt_dinov3, sapiens2", """def f(q, k, cos, sin, **kwargs):
    num_tokens = q.shape[-2]
    num_patches = sin.shape[-2]
    num_prefix_tokens = num_tokens - num_patches
    q_prefix_tokens, q_patches = q.split((num_prefix_tokens, num_patches), dim=-2)
    k_prefix_tokens, k_patches = k.split((num_prefix_tokens, num_patches), dim=-2)
    q_patches = q_patches * cos + rotate_half(q_patches) * sin
    k_patches = k_patches * cos + rotate_half(k_patches) * sin
    q = torch.cat((q_prefix_tokens, q_patches), dim=-2)
    k = torch.cat((k_prefix_tokens, k_patches), dim=-2)
    return q, k""", form="patches"),
    Rotary("vision towers: sam3; edgetam_video (self-attention)", """def f(q, k, cos, sin):
    q_embed = q.float()
    q_embed = q_embed * cos + rotate_pairwise(q_embed) * sin
    k_embed = k.float()
    k_embed = k_embed * cos + rotate_pairwise(k_embed) * sin
    return q_embed.type_as(q), k_embed.type_as(k)""", helper="rotate_pairwise", promotes=False, form="grid"),
    Rotary("sam2_video, sam3_tracker_video", """def f(q, k, cos, sin, num_k_exclude_rope=0, repeat_freqs_k=False):
    k_rot, k_pass = k[..., : k.shape[-2] - num_k_exclude_rope, :], k[..., k.shape[-2] - num_k_exclude_rope :, :]
    q_embed = q.float()
    q_embed = q_embed * cos + rotate_pairwise(q_embed) * sin
    if k_rot.shape[-2] == 0:
        return q_embed.type_as(q), torch.cat([k_rot, k_pass], dim=-2)
    if repeat_freqs_k and k_rot.shape[-2] != q.shape[-2]:
        repeat_factor = k_rot.shape[-2] // q.shape[-2]
        cos_k = cos.repeat(1, 1, repeat_factor, 1)
        sin_k = sin.repeat(1, 1, repeat_factor, 1)
    else:
        cos_k = cos
        sin_k = sin
    k_embed = k_rot.float()
    k_embed = k_embed * cos_k + rotate_pairwise(k_embed) * sin_k
    k_embed = torch.cat([k_embed.type_as(k), k_pass], dim=-2)
    return q_embed.type_as(q), k_embed""", helper="rotate_pairwise", promotes=False, form="memory"),
    Rotary("pe_audio, pe_video, pe_audio_video", """def f(q, k, cos, sin, unsqueeze_dim=1):
    freqs_cis = stack_freqs(cos, sin)
    freqs_cis = freqs_cis.unsqueeze(unsqueeze_dim)
    q_ = q.reshape(*q.shape[:-1], -1, 1, 2)
    k_ = k.reshape(*k.shape[:-1], -1, 1, 2)
    return (q_ * freqs_cis).sum(5).flatten(3), (k_ * freqs_cis).sum(5).flatten(3)""", helper="stack_freqs",
           tables="first half"),
    Rotary("muse_glimmer_assistant", _DEF + _UNSQUEEZE + """    q_len = q.size(-2)
    q_embed = q * cos[..., -q_len:, :] + rotate_half(q) * sin[..., -q_len:, :]
    k_embed = k * cos + rotate_half(k) * sin
""" + _RETURN, form="last tokens"),
    Rotary("deepseek_v4", """def f(x, cos, sin, unsqueeze_dim=1):
    cos = cos.repeat_interleave(2, dim=-1).unsqueeze(unsqueeze_dim)
    sin = sin.repeat_interleave(2, dim=-1).unsqueeze(unsqueeze_dim)
    rope_dim = cos.shape[-1]
    nope, rope = x[..., :-rope_dim], x[..., -rope_dim:]
    rotated = (rope.float() * cos + rotate_half(rope).float() * sin).to(x.dtype)
    return torch.cat([nope, rotated], dim=-1)""", tables="pairs", promotes=False, form="last elements"),
)  # fmt: skip

# The texts of the helpers.
PAIRINGS = {
    """def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)""": Pairing(False),
    """def rotate_half(x):
    x1 = x[..., 0::2]
    x2 = x[..., 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)""": Pairing(True),
    """def rotate_half(x):
    x1 = x[..., ::2]
    x2 = x[..., 1::2]
    rot_x = torch.stack([-x2, x1], dim=-1).flatten(-2)
    return rot_x""": Pairing(True),
    """def _apply_rotary_emb(x, cos, sin):
    first_half, second_half = torch.chunk(x, 2, dim=-1)
    first_ = first_half * cos - second_half * sin
    second_ = second_half * cos + first_half * sin
    return torch.cat((first_, second_), dim=-1)""": Pairing(False),
    """def rotate_every_two(x):
    x1 = x[:, :, :, ::2]
    x2 = x[:, :, :, 1::2]
    x = torch.stack((-x2, x1), dim=-1)
    return x.flatten(-2)""": Pairing(True),
    """def reshape_for_broadcast(freqs_ci, query):
    ndim = query.ndim
    shape = [d if i == 1 or i == ndim - 1 else 1 for i, d in enumerate(query.shape)]
    return freqs_ci.view(*shape)""": Pairing(True),
    """def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((x2, -x1), dim=-1)""": Pairing(False, inverse=True),
    """def _apply_rotary_emb(x, cos, sin):
    first_half, second_half = x[..., ::2], x[..., 1::2]
    first_ = first_half * cos - second_half * sin
    second_ = second_half * cos + first_half * sin
    return torch.stack((first_, second_), dim=-1).flatten(-2)""": Pairing(True),
    """def rotate_pairwise(x):
    x = x.view(*x.shape[:-1], -1, 2)
    x1, x2 = x.unbind(dim=-1)
    return torch.stack((-x2, x1), dim=-1).flatten(start_dim=-2)""": Pairing(True),
    """def rotate_pairwise(x):
    x = x.view(*x.shape[:-1], -1, 2)
    x1, x2 = x.unbind(dim=-1)
    x = torch.stack((-x2, x1), dim=-1)
    return x.flatten(start_dim=-2)""": Pairing(True),
    """def stack_freqs(cos, sin):
    dim = cos.size(-1)
    cos = cos.narrow(-1, 0, dim // 2)
    sin = sin.narrow(-1, 0, dim // 2)
    freqs_cis = torch.stack((cos, -sin, sin, cos), dim=-1).view(*cos.size(), 2, 2)
    return freqs_cis""": Pairing(True),
}
