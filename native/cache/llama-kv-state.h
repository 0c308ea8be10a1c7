#pragma once

#include "llama-kv-state-io.h"

#include "llama.h"

// states of contexts whose memory is bounded, in place of upstream's: llama_context's state_* functions call these first
//
// - one envelope: magic, version, size, what the model and the settings must be, one part per sequence, a checksum over all of it
// - a state is read twice: everything is checked before anything changes
// - a refusal leaves the sequence empty and poisoned; what it was for: llama_kv_policy_state_status()
// - nothing throws

// the context is bounded, or the bytes are the state of one that was (which an unbounded context has to refuse by name)
bool llama_kv_state_owns     (const llama_context & lctx, llama_seq_id seq_id, const uint8_t * src, size_t size);
bool llama_kv_state_owns_file(const llama_context & lctx, const char * path);

// seq_id -1: all sequences; dst nullptr: the size; returns bytes, 0 on failure
size_t llama_kv_state_get(llama_context & lctx, llama_seq_id seq_id, uint8_t * dst, size_t size, llama_state_seq_flags flags);

// returns bytes read; on failure 0, but SIZE_MAX for a state of size 0 (saved without looking), for which 0 would look like a success
size_t llama_kv_state_set(llama_context & lctx, llama_seq_id seq_id, const uint8_t * src, size_t size, llama_state_seq_flags flags);

// files as upstream's, with the tokens under the checksum; a file is the old one or the new one at any time
size_t llama_kv_state_save(llama_context & lctx, llama_seq_id seq_id, const char * path, const llama_token * tokens, size_t n_tokens);
size_t llama_kv_state_load(llama_context & lctx, llama_seq_id seq_id, const char * path, llama_token * tokens, size_t n_max, size_t * n_tokens);
