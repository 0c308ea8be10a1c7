#pragma once

// what llama-server cannot do with a model, or with a bounded cache, said before it is tried

#include "common.h"

#include "../src/llama-ext.h"

#include <string>
#include <vector>

struct mtmd_context;
struct server_tokens;

// false, and an error in the log, if the server could not do what it is started for
bool server_can_start(const common_params & params, const llama_context * ctx, const mtmd_context * mctx);

// false, and a warning, if drafts of n_max tokens could not always be taken back; ctx_dft: of a draft model, or NULL
bool server_can_draft(
        const llama_context * ctx_tgt, common_context_seq_rm_type type_tgt,
        const llama_context * ctx_dft, common_context_seq_rm_type type_dft, int32_t n_max);

// why a prompt cannot be read, or ""
std::string server_why_not_read(const server_tokens & prompt, const llama_context * ctx, const mtmd_context * mctx);

// whether a prompt that was read with some adapters is of no use with others; `now` is empty where there are none
bool server_lora_changes(const std::vector<common_adapter_lora_info> & now, const std::vector<common_adapter_lora_info> & next);
