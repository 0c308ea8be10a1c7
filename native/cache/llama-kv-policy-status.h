#pragma once

// what a policy's text comes to: part of the C API, and all of it that does not need llama.h
enum llama_kv_policy_status {
    LLAMA_KV_POLICY_OK          =  0,
    LLAMA_KV_POLICY_USAGE       = -1, // the text is malformed, or has a word or number that nobody knows
    LLAMA_KV_POLICY_BUDGET      = -2, // out of range, or too small for what must be kept
    LLAMA_KV_POLICY_UNSUPPORTED = -3, // a property of the model or of the context rules it out
    LLAMA_KV_POLICY_MEMORY      = -4,
};
