#pragma once

#include "llama-kv-rule.h"
#include "llama-kv-victim.h"

// the rules that exist, one file each: ../policies/<name>.cpp; the registry is in llama-kv-policy-spec.cpp

std::unique_ptr<llama_kv_rule> llama_kv_rule_h2o();
std::unique_ptr<llama_kv_rule> llama_kv_rule_random();
std::unique_ptr<llama_kv_rule> llama_kv_rule_tova();
std::unique_ptr<llama_kv_rule> llama_kv_rule_snapkv();
std::unique_ptr<llama_kv_rule> llama_kv_rule_a2sf();
std::unique_ptr<llama_kv_rule> llama_kv_rule_vatp();
std::unique_ptr<llama_kv_rule> llama_kv_rule_caote();
std::unique_ptr<llama_kv_rule> llama_kv_rule_fastcaote();
std::unique_ptr<llama_kv_rule> llama_kv_rule_pagedeviction();
std::unique_ptr<llama_kv_rule> llama_kv_rule_keydiff();
std::unique_ptr<llama_kv_rule> llama_kv_rule_knorm();
std::unique_ptr<llama_kv_rule> llama_kv_rule_rkv();
