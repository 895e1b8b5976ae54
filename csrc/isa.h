// Which instruction sets this build holds, this processor runs, and the caller wants.
#pragma once

#include <string>
#include <vector>

#include "product.h"
#include "table.h"

namespace secateur {

// Names that can be used here, best last: of kernels that select, and of those that multiply.
std::vector<std::string> usable_isas();
std::vector<std::string> usable_product_isas();

// The kernels in use: those asked for, or named by an environment variable, or the best. The variable is SECATEUR_ISA; for
// products SECATEUR_PRODUCT_ISA comes before it.
// Throws std::invalid_argument if it names some that cannot be used here.
const Kernels& kernels();
const ProductKernels& product_kernels();

// Uses these from now on. Throws std::invalid_argument if they cannot be used here.
void use_isa(const std::string& name);
void use_product_isa(const std::string& name);

}  // namespace secateur
