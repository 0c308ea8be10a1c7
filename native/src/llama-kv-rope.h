#pragma once

#include "llama.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <vector>

struct llama_cparams;
struct llama_hparams;
struct llama_model;

// the rotation of stored keys, per layer: upstream's RoPE with the layer's parameters, of magnitude 1
//   (YaRN's factor is in the keys already), on keys as the cache holds them (Hadamard-rotated when they are quantised)
class llama_kv_rope {
public:
    struct params {
        int64_t n_embd_head;
        int64_t n_head_kv;
        int32_t n_rot;
        int64_t n_nope; // dimensions in front of the rotated ones (latent attention)
        float   freq_base;
        float   freq_scale;

        const ggml_tensor * factors;
    };

    // had: the Hadamard matrix that K is stored with (n x n, n*n values), or empty
    llama_kv_rope(const llama_model & model, const llama_hparams & hparams, const llama_cparams & cparams, std::vector<float> had);

    // false if the layer has no rotary positions
    bool has(uint32_t il) const;

    params get(uint32_t il) const;

    // the same rotation for the same angle
    bool same(uint32_t il_a, uint32_t il_b) const;

    // keys [n_embd_k_gqa, n_rows] -> rotated, the same shape; f32, or another type that upstream can rotate if K is not quantised
    // pos: i32 [n_rows], or [1] for one angle for all rows (the trigonometry is computed once)
    // buft: of the device that computes
    // back: by the opposite angle
    ggml_tensor * build(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos, uint32_t il, ggml_backend_buffer_type_t buft, bool back = false);

    bool has_hadamard() const { return !had.empty(); }

private:
    // a copy of the factors (nullptr: of the Hadamard matrix) on the device of a buffer type: the model may keep its own elsewhere
    ggml_tensor * constant(const ggml_tensor * factors, ggml_backend_buffer_type_t buft);

    std::vector<float> read(const ggml_tensor * t) const;

    const llama_model   & model;
    const llama_hparams & hparams;
    const llama_cparams & cparams;

    const std::vector<float> had;

    struct block {
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;
        ggml_tensor *           t = nullptr;
    };

    std::map<std::pair<const ggml_tensor *, ggml_backend_buffer_type_t>, block> constants;
};
