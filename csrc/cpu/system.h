// SPDX-License-Identifier: Apache-2.0
// The system headers of the kernels, included before a level's target pragma: what they define
// inline must be compiled for every processor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "../formats.h"
#include "float_env.h"
