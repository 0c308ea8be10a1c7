#pragma once

#include "ggml-backend.h"

#include <cstdint>

// bytes that can still be allocated on the device, 0 if it does not tell; nullptr: the host, without swapping, within the limits of this
//   process and of its control group
int64_t llama_kv_memory_free(ggml_backend_dev_t dev);
