// The part of the Python module that packs.
#pragma once

#include <nanobind/nanobind.h>

namespace secateur {

void bind_packing(nanobind::module_& m);

}  // namespace secateur
