#pragma once

#include "llama-kv-state-io.h"

#include "ggml.h"

// rows of tensors in saved states, on whichever device they lie; slots: ascending
// reading: is_check: the bytes are there, and nothing is written yet

// rows of nb[1] bytes each, from the offset on
void llama_kv_state_write_rows(llama_kv_state_writer & out, const ggml_tensor * t, size_t offs, const std::vector<uint32_t> & slots);
void llama_kv_state_read_rows (llama_kv_state_reader & in,        ggml_tensor * t, size_t offs, const std::vector<uint32_t> & slots, bool is_check);

// the same where a slot is a column: n_lines lines of n_slots elements; elements of other slots are zero afterwards
void llama_kv_state_write_cols(llama_kv_state_writer & out, const ggml_tensor * t, size_t offs, size_t n_lines, size_t n_slots, const std::vector<uint32_t> & slots);
void llama_kv_state_read_cols (llama_kv_state_reader & in,        ggml_tensor * t, size_t offs, size_t n_lines, size_t n_slots, const std::vector<uint32_t> & slots, bool is_check);
