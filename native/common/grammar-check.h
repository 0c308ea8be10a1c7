#pragma once

#include <string>

struct common_params_sampling;

// throws std::invalid_argument for a grammar that upstream would recurse over too deeply, or sample with for ever; what does not parse
// is upstream's to refuse
void grammar_check(const std::string & text);

// the grammar of a request, and the patterns that start one; throws std::invalid_argument
void sampling_check(const common_params_sampling & params);
