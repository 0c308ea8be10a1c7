#pragma once

#include "llama.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <vector>

// the rotation of stored keys, per layer: that of the model's own graph, of magnitude 1 (YaRN's factor is in the keys already),
//   on keys as the cache holds them (Hadamard-rotated when they are quantised)
class llama_kv_rope {
public:
    // had: the Hadamard matrix that the cache's K may be multiplied with (n x n, n*n values), or empty
    explicit llama_kv_rope(std::vector<float> had);

    // learn from a graph how the model makes the keys of a layer; k_cur: as they go into the cache, [n_embd_head, n_head_kv, n_tokens]
    // false if they are changed after their rotation in a way that no later rotation can follow
    bool observe(uint32_t il, const ggml_tensor * k_cur);

    // false if the layer has no rotary positions
    bool has(uint32_t il) const { return layers.count(il) > 0; }

    // by position 0 it leaves a key as it is, to the bit
    bool is_exact(uint32_t il) const { return !has(il) || layers.at(il).ext_factor == 0.0f; }

    // the same rotation for the same angle
    bool same(uint32_t il_a, uint32_t il_b) const;

    // keys [n_embd_k_gqa, n_rows], or of single heads [n_embd_head, n_rows] -> rotated, the same shape; f32, or another type that upstream can rotate if K is not quantised
    // pos: i32 [n_rows], or [1] for one angle for all rows (the trigonometry is computed once)
    // buft: of the device that computes
    // plain: the keys come in without the Hadamard rotation, see unwrap()
    ggml_tensor * build(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos, uint32_t il, ggml_backend_buffer_type_t buft, bool plain = false);

    // by the opposite angle, and without the Hadamard rotation afterwards
    ggml_tensor * build_back(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos, uint32_t il, ggml_backend_buffer_type_t buft);

    // keys as the cache holds them -> without the Hadamard rotation, f32 and contiguous; as they are if there is none
    ggml_tensor * unwrap(ggml_context * ctx, ggml_tensor * cur, uint32_t il, ggml_backend_buffer_type_t buft);

    // on the host, without ggml: every angle grows with the position alone
    // false: the layer's keys have several positions each
    bool is_linear(uint32_t il) const;

    // read what undo() needs; the model's weights are loaded
    void prepare_undo();

    // a key of one head as the cache holds it [n_embd] -> as it was before its rotation to `pos`, without the Hadamard product
    // called from several threads
    void undo(uint32_t il, float * key, uint32_t n_embd, int32_t pos) const;

private:
    struct params {
        int64_t n_embd_head;
        int64_t n_head_kv;
        int32_t n_rot;
        int32_t n_offs; // dimensions in front of the rotated ones (latent attention)
        int32_t mode;
        int32_t n_ctx_orig;
        float   freq_base;
        float   freq_scale;
        float   ext_factor;
        float   beta_fast;
        float   beta_slow;
        bool    is_had; // the cache's keys are multiplied with the Hadamard matrix

        const ggml_tensor * factors;

        std::vector<double> angles; // [n_rot/2] per position, for undo()
    };

    ggml_tensor * build(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos, uint32_t il, ggml_backend_buffer_type_t buft, bool plain, bool back);

    // a copy of the factors (nullptr: of the Hadamard matrix) on the device of a buffer type: the model may keep its own elsewhere
    ggml_tensor * constant(const ggml_tensor * factors, ggml_backend_buffer_type_t buft);

    const std::vector<float> had;

    std::map<uint32_t, params> layers; // those with rotary positions

    struct block {
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;
        ggml_tensor *           t = nullptr;
    };

    std::map<std::pair<const ggml_tensor *, ggml_backend_buffer_type_t>, block> constants;
};
