#include "llama-kv-rope.h"

#include "llama-impl.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

llama_kv_rope::llama_kv_rope(std::vector<float> had) : had(std::move(had)) {
}

namespace {

int32_t op_int(const ggml_tensor * t, uint32_t i) {
    return t->op_params[i];
}

float op_float(const ggml_tensor * t, uint32_t i) {
    float res;
    memcpy(&res, &t->op_params[i], sizeof(res));
    return res;
}

// the rotation that these values come from, and what happened to them since
struct trace {
    const ggml_tensor * rope = nullptr;

    int32_t n_offs = 0;     // where the rotated values begin in a head
    bool    is_had = false; // multiplied with the Hadamard matrix
    bool    mixed  = false; // changed in a way that does not commute with a rotation
};

trace trace_rope(const ggml_tensor * t) {
    trace res;

    switch (t->op) {
        case GGML_OP_ROPE:
            res.rope   = t;
            res.n_offs = op_int(t, 15);
            return res;
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
        case GGML_OP_CONT:
        case GGML_OP_CPY:
        case GGML_OP_DUP:
        case GGML_OP_REPEAT:
        case GGML_OP_SCALE:
            return trace_rope(t->src[0]);
        case GGML_OP_MUL_MAT:
            if (op_int(t, 1) == GGML_HINT_SRC0_IS_HADAMARD) {
                res = trace_rope(t->src[1]);
                res.is_had = true;
            }
            return res; // else a projection: the keys begin here
        case GGML_OP_CONCAT:
            res = trace_rope(t->src[0]);
            if (!res.rope) {
                res = trace_rope(t->src[1]);
                res.n_offs += op_int(t, 0) == 0 ? (int32_t) t->src[0]->ne[0] : 0;
            }
            return res;
        default:
            if (t->src[0]) {
                res = trace_rope(t->src[0]);
                res.mixed = res.mixed || res.rope;
            }
            return res;
    }
}

std::vector<float> read(const ggml_tensor * t) {
    GGML_ASSERT(t->type == GGML_TYPE_F32);

    std::vector<float> res(ggml_nelements(t));
    ggml_backend_tensor_get(t, res.data(), 0, ggml_nbytes(t));

    return res;
}

}

bool llama_kv_rope::observe(uint32_t il, const ggml_tensor * k_cur) {
    const trace found = trace_rope(k_cur);

    layers.erase(il);

    if (!found.rope) {
        return true;
    }

    params p;
    p.n_embd_head = k_cur->ne[0];
    p.n_head_kv   = k_cur->ne[1];
    p.n_rot       = op_int(found.rope, 1);
    p.n_offs      = found.n_offs;
    p.mode        = op_int(found.rope, 2);
    p.n_ctx_orig  = op_int(found.rope, 4);
    p.freq_base   = op_float(found.rope, 5);
    p.freq_scale  = op_float(found.rope, 6);
    p.ext_factor  = op_float(found.rope, 7);
    p.beta_fast   = op_float(found.rope, 9);
    p.beta_slow   = op_float(found.rope, 10);
    p.is_had      = found.is_had && !had.empty();
    p.factors     = found.rope->src[2];

    layers[il] = p;

    return !found.mixed;
}

bool llama_kv_rope::same(uint32_t il_a, uint32_t il_b) const {
    const params & a = layers.at(il_a);
    const params & b = layers.at(il_b);

    if (a.n_embd_head != b.n_embd_head || a.n_head_kv != b.n_head_kv || a.n_rot != b.n_rot || a.n_offs != b.n_offs || a.mode != b.mode ||
        a.n_ctx_orig != b.n_ctx_orig || a.freq_base != b.freq_base || a.freq_scale != b.freq_scale || a.ext_factor != b.ext_factor ||
        a.beta_fast != b.beta_fast || a.beta_slow != b.beta_slow || a.is_had != b.is_had || (a.factors == nullptr) != (b.factors == nullptr)) {
        return false;
    }

    // each layer may hold its own copy of the factors
    return a.factors == b.factors || read(a.factors) == read(b.factors);
}

bool llama_kv_rope::is_linear(uint32_t il) const {
    return !has(il) || layers.at(il).mode == GGML_ROPE_TYPE_NORMAL || layers.at(il).mode == GGML_ROPE_TYPE_NEOX;
}

// the angles of ggml_rope_ext
void llama_kv_rope::prepare_undo() {
    for (auto & [il, p] : layers) {
        const std::vector<float> factors = p.factors ? read(p.factors) : std::vector<float>();

        float dims[2];
        ggml_rope_yarn_corr_dims(p.n_rot, p.n_ctx_orig, p.freq_base, p.beta_fast, p.beta_slow, dims);

        p.angles.resize(p.n_rot/2);
        for (int32_t i = 0; i < p.n_rot/2; ++i) {
            const double extrap = std::pow((double) p.freq_base, -2.0*i/p.n_rot)/(factors.empty() ? 1.0f : factors[i]);
            const double interp = p.freq_scale*extrap;

            const double ramp = 1.0 - std::min(1.0, std::max(0.0, (i - (double) dims[0])/std::max(0.001, (double) dims[1] - dims[0])));
            const double mix  = p.ext_factor*ramp;

            p.angles[i] = interp*(1.0 - mix) + extrap*mix;
        }
    }
}

void llama_kv_rope::undo(uint32_t il, float * key, uint32_t n_embd, int32_t pos) const {
    const auto it = layers.find(il);

    const bool has_rope = it != layers.end();

    // a layer without rotary positions is multiplied all the same
    if (has_rope ? it->second.is_had : !had.empty()) {
        const int64_t n = std::lround(std::sqrt((double) had.size()));

        std::vector<float> block(n);
        for (float * x = key; x < key + n_embd; x += n) {
            for (int64_t r = 0; r < n; ++r) {
                block[r] = 0.0f;
                for (int64_t c = 0; c < n; ++c) {
                    block[r] += had[r*n + c]*x[c];
                }
            }
            std::copy(block.begin(), block.end(), x);
        }
    }

    if (!has_rope) {
        return;
    }
    const params & p = it->second;

    const bool is_neox = p.mode == GGML_ROPE_TYPE_NEOX;

    for (int32_t i = 0; i < p.n_rot/2; ++i) {
        float & a = key[p.n_offs + (is_neox ? i              : 2*i)];
        float & b = key[p.n_offs + (is_neox ? i + p.n_rot/2 : 2*i + 1)];

        const double c = std::cos(pos*p.angles[i]);
        const double s = std::sin(pos*p.angles[i]);

        const double x =  a*c + b*s;
        const double y = -a*s + b*c;

        a = (float) x;
        b = (float) y;
    }
}

ggml_tensor * llama_kv_rope::constant(const ggml_tensor * factors, ggml_backend_buffer_type_t buft) {
    auto & res = constants[{ factors, buft }];

    if (!res.t) {
        const std::vector<float> data = factors ? read(factors) : had;
        const int64_t            ne0  = factors ? data.size() : std::lround(std::sqrt((double) had.size()));

        res.ctx.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
        res.t = ggml_new_tensor_2d(res.ctx.get(), GGML_TYPE_F32, ne0, data.size()/ne0);

        res.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(res.ctx.get(), buft));
        if (!res.buf) {
            throw std::runtime_error("failed to allocate buffer for the parameters of the rotation");
        }
        ggml_backend_tensor_set(res.t, data.data(), 0, data.size()*sizeof(float));
    }

    return res.t;
}

ggml_tensor * llama_kv_rope::build(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos, uint32_t il, ggml_backend_buffer_type_t buft, bool plain) {
    return build(ctx, cur, pos, il, buft, plain, /*back =*/ false);
}

ggml_tensor * llama_kv_rope::build_back(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos, uint32_t il, ggml_backend_buffer_type_t buft) {
    return build(ctx, cur, pos, il, buft, /*plain =*/ false, /*back =*/ true);
}

ggml_tensor * llama_kv_rope::unwrap(ggml_context * ctx, ggml_tensor * cur, uint32_t il, ggml_backend_buffer_type_t buft) {
    return layers.at(il).is_had ? llama_mul_mat_hadamard(ctx, cur, constant(nullptr, buft)) : cur; // its own inverse
}

ggml_tensor * llama_kv_rope::build(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos, uint32_t il, ggml_backend_buffer_type_t buft, bool plain, bool back) {
    const params & p = layers.at(il);

    const int64_t n_embd = cur->ne[0];
    const int64_t n_rows = cur->ne[1];

    const int64_t n_head = n_embd/p.n_embd_head;

    cur = pos->ne[0] == 1 ?
        ggml_reshape_3d(ctx, cur, p.n_embd_head, n_head*n_rows, 1) :
        ggml_reshape_3d(ctx, cur, p.n_embd_head, n_head, n_rows);

    if (!plain) {
        cur = unwrap(ctx, cur, il, buft);
    }

    ggml_tensor * factors = p.factors ? constant(p.factors, buft) : nullptr;

    // cancels the magnitude factor that ggml applies for YaRN
    const float attn_factor = p.ext_factor != 0.0f ? 1.0f/(1.0f + 0.1f*logf(1.0f/p.freq_scale)) : 1.0f;

    const auto rope = back ? ggml_rope_ext_back : ggml_rope_ext;

    cur = rope(ctx, cur, pos, factors, p.n_rot, p.mode, p.n_ctx_orig, p.freq_base, p.freq_scale, p.ext_factor, attn_factor, p.beta_fast, p.beta_slow);
    if (p.n_offs > 0) {
        cur = ggml_rope_set_offset(cur, p.n_offs);
    }

    if (p.is_had && !back) {
        cur = llama_mul_mat_hadamard(ctx, cur, constant(nullptr, buft));
    }

    return ggml_reshape_2d(ctx, cur, n_embd, n_rows);
}
