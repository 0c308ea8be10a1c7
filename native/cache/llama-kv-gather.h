#pragma once

#include "llama-kv-ledger.h"
#include "llama-kv-move.h"
#include "llama-kv-sinks.h"

// update `gather`, a baseline: evict, copy the kept rows together, and, with positions by rank, rotate all keys afresh from an
//   un-rotated copy; what the code of StreamingLLM and of H2O does at each step (arXiv 2309.17453, 2306.14048), with ggml
// - un-rotated keys are kept without the Hadamard rotation of a quantised cache, which is then done once per step and not twice
// - un-rotated keys lie in two halves and are copied from one to the other, as a concatenation into a new tensor would
// - values are copied out and back, since attention reads them from one place
class llama_kv_gather {
public:
    static constexpr uint32_t N_NODES_BUILD = 16; // most nodes of build(), views included

    // rope: nullptr with positions `true`: then nothing is rotated, and no copy is kept
    llama_kv_gather(llama_kv_rope * rope, llama_kv_backends & backends, const std::vector<llama_kv_layer> & layers,
            uint32_t n_stream, uint32_t n_ubatch, bool v_trans);

    // copy the rows; the caller has synchronised; n_kept: tokens, in the slots [0, n_kept) afterwards
    // with_keys: the rotated keys too, where rotate() does not follow (positions `auto` before it goes over to ranks)
    // moves_of: of each layer and KV head; per_head: they differ between heads, else those of the first head are taken for the row
    bool move(uint32_t strm, const llama_kv_moves_of & moves_of, bool per_head, uint32_t n_kept, bool with_keys);

    // rotate the keys of the slots [0, n_kept) to the positions [first, first + n_kept)
    bool rotate(uint32_t strm, int32_t first, uint32_t n_kept);

    // a ubatch comes: position and slot of each of its tokens, in the order of the ubatch
    void set(const std::vector<int32_t> & pos, const std::vector<uint32_t> & strm, const std::vector<uint32_t> & slots);

    // keep an un-rotated copy of the keys of the ubatch; k_cur: [n_embd_head, n_head_kv, n_tokens]
    void build(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * k_cur, uint32_t il);

    // saved states: the un-rotated keys of these slots, ascending; is_check: nothing is changed
    void state_write(llama_kv_state_writer & out, uint32_t strm, const std::vector<uint32_t> & slots) const;
    void state_read (llama_kv_state_reader & in,  uint32_t strm, const std::vector<uint32_t> & slots, bool is_check);

private:
    struct copy {
        ggml_tensor * k    = nullptr; // [n_embd_k_gqa, 2*n_slots*n_stream], in K's type, f16 if that is quantised; nullptr: the layer has no RoPE
        ggml_tensor * pos  = nullptr; // i32 [n_ubatch], one per device
        ggml_tensor * idxs = nullptr; // i64 [n_ubatch], one per device
    };

    // rows [i0, i0 + n) of one half of one stream; of all heads, or of one of n_head
    ggml_tensor * rows(ggml_context * ctx, const copy & c, uint32_t strm, uint32_t half, uint32_t i0, uint32_t n, uint32_t i_head = 0, uint32_t n_head = 1) const;

    llama_kv_rope     * rope;
    llama_kv_backends & backends;

    const std::vector<llama_kv_layer> & layers;

    const bool     v_trans;
    const uint32_t n_slots;

    std::vector<copy>     copies; // [layer]
    std::vector<uint32_t> half;   // [n_stream] which one holds the kept keys

    struct block {
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;
    };

    std::map<ggml_backend_buffer_type_t, block> blocks;
};
