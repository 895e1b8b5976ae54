// Which instruction sets this build holds, this processor runs, and the caller wants.
#pragma once

#include <string>
#include <vector>

#include "table.h"

namespace secateur {

// Names that can be used here, best last.
std::vector<std::string> usable_isas();

// The kernels in use: those asked for, or named by the environment variable SECATEUR_ISA, or the best.
// Throws std::invalid_argument if SECATEUR_ISA names some that cannot be used here.
const Kernels& kernels();

// Uses these from now on. Throws std::invalid_argument if they cannot be used here.
void use_isa(const std::string& name);

}  // namespace secateur
