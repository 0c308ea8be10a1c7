#pragma once

#include "llama-kv-formula.h"
#include "llama-kv-victim.h"

// the formulas that exist, one file each: ../policies/<name>.cpp; the registry is in llama-kv-policy-spec.cpp

std::unique_ptr<llama_kv_formula> llama_kv_formula_h2o();
std::unique_ptr<llama_kv_formula> llama_kv_formula_random();
std::unique_ptr<llama_kv_formula> llama_kv_formula_tova();
std::unique_ptr<llama_kv_formula> llama_kv_formula_snapkv();
std::unique_ptr<llama_kv_formula> llama_kv_formula_a2sf();
std::unique_ptr<llama_kv_formula> llama_kv_formula_vatp();
std::unique_ptr<llama_kv_formula> llama_kv_formula_caote();
std::unique_ptr<llama_kv_formula> llama_kv_formula_fastcaote();
std::unique_ptr<llama_kv_formula> llama_kv_formula_pagedeviction();
std::unique_ptr<llama_kv_formula> llama_kv_formula_keydiff();
std::unique_ptr<llama_kv_formula> llama_kv_formula_knorm();
std::unique_ptr<llama_kv_formula> llama_kv_formula_rkv();
std::unique_ptr<llama_kv_formula> llama_kv_formula_external();
std::unique_ptr<llama_kv_formula> llama_kv_formula_lagkv();
