#pragma once

// between equip-gguf.cpp, which finds and opens a model file, and equip-gguf-check.cpp, which looks at what it claims

#include "gguf.h"

#include <cstdint>
#include <string>

[[noreturn]] void equip_fail_damaged(const std::string & path, const std::string & why);

int64_t     equip_gguf_max   (const gguf_context * ctx, const std::string & key, int64_t def); // largest value, or def
std::string equip_gguf_string(const gguf_context * ctx, const std::string & key);              // empty if there is none

void equip_check_tensors(const std::string & path, const gguf_context * ctx); // also of the other parts of a split file
void equip_check_gguf   (const std::string & path, const gguf_context * ctx, const std::string & arch);
