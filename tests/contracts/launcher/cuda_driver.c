// A substitute for the CUDA driver (libcuda.so.1) that launches nothing and records every launch.
//
// It defines the driver functions that Triton's launcher calls. A module's image is PTX text: the `.param` declarations
// of the kernel give the size of each parameter, so a launch is recorded byte for byte. As a real driver does, it
// refuses a launch whose function or stream belongs to another context than the current one, and a tensor map that the
// hardware would not take. `recorder_*` at the end are for the tests.

#include <ctype.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cuda.h"

#define DEVICES 4
#define MOST_PARAMETERS 256

struct CUctx_st {
  int device;
};
struct CUstream_st {
  int device;
};
struct CUmod_st {
  int device;
  char *image;
};
struct CUfunc_st {
  int device;
  char name[256];
  int parameters;
  size_t sizes[MOST_PARAMETERS];
  int most_dynamic_shared;
};

static struct CUctx_st contexts[DEVICES] = {{0}, {1}, {2}, {3}};
static int capabilities[DEVICES] = {90, 80, 90, 80};
static __thread CUcontext current = NULL;  // each thread has its own, as in CUDA

// --- devices and contexts ---------------------------------------------------------------------------------------------

CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  *count = DEVICES;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return ordinal >= 0 && ordinal < DEVICES ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  if (device < 0 || device >= DEVICES)
    return CUDA_ERROR_INVALID_DEVICE;
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
    *value = capabilities[device] / 10;
    break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
    *value = capabilities[device] % 10;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    *value = (capabilities[device] == 90 ? 227 : 163) * 1024;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    *value = (capabilities[device] == 90 ? 228 : 164) * 1024;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    *value = 65536;
    break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    *value = 32;
    break;
  default:  // processors, clocks, the width of the memory bus
    *value = 2;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  if (device < 0 || device >= DEVICES)
    return CUDA_ERROR_INVALID_DEVICE;
  *context = &contexts[device];
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  if (!current)
    return CUDA_ERROR_INVALID_CONTEXT;
  *device = current->device;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult error, const char **text) {
  switch (error) {
  case CUDA_ERROR_INVALID_VALUE:
    *text = "invalid argument";
    break;
  case CUDA_ERROR_INVALID_IMAGE:
    *text = "device kernel image is invalid";
    break;
  case CUDA_ERROR_INVALID_CONTEXT:
    *text = "invalid device context";
    break;
  case CUDA_ERROR_INVALID_HANDLE:
    *text = "invalid resource handle";
    break;
  default:
    *text = "an error of the substitute driver";
  }
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

// --- modules and functions --------------------------------------------------------------------------------------------

static useconds_t load_delay = 0;

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (!current)
    return CUDA_ERROR_INVALID_CONTEXT;
  if (!strstr(image, ".entry"))
    return CUDA_ERROR_INVALID_IMAGE;
  usleep(load_delay);
  *module = malloc(sizeof(**module));
  (*module)->device = current->device;
  (*module)->image = strdup(image);
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {  // its functions stay allocated: a launch of one is then refused, not a crash
  free(module->image);
  free(module);
  return CUDA_SUCCESS;
}

// The size of the parameter that is declared at `at`: `.param .align 64 .b8 name[128]`, or `.param .u64 .ptr name`.
static size_t declared_size(const char *at, const char *end) {
  size_t element = 0, count = 1;
  for (; at < end && *at != ','; at++) {
    if (*at == '.' && strchr("bfsu", at[1]) && isdigit(at[2]))
      element = strtoul(at + 2, NULL, 10) / 8;
    else if (*at == '[')
      count = strtoul(at + 1, NULL, 10);
  }
  return element * count;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  char wanted[300];
  snprintf(wanted, sizeof(wanted), ".entry %s(", name);
  const char *at = strstr(module->image, wanted);
  if (!at)
    return CUDA_ERROR_NOT_FOUND;
  const char *end = strchr(at + strlen(wanted), ')');
  CUfunction found = calloc(1, sizeof(*found));
  found->device = module->device;
  found->most_dynamic_shared = 48 * 1024;
  snprintf(found->name, sizeof(found->name), "%s", name);
  while ((at = strstr(at, ".param")) && at < end) {
    at += strlen(".param");
    size_t size = declared_size(at, end);
    if (!size || found->parameters == MOST_PARAMETERS)
      return CUDA_ERROR_INVALID_IMAGE;
    found->sizes[found->parameters++] = size;
  }
  *function = found;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    function->most_dynamic_shared = value;
  else if (attribute != CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED)
    return CUDA_ERROR_INVALID_VALUE;  // Triton then takes the older way
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

// --- tensor maps: the 128 bytes hold what they were made of ------------------------------------------------------------

struct map {
  uint64_t address, sizes[5], strides[4];
  uint32_t box[5];
  uint8_t element_strides[5], type, rank, swizzle, interleave, promotion, fill;
};
_Static_assert(sizeof(struct map) <= sizeof(CUtensorMap), "a tensor map has 128 bytes");

CUresult cuTensorMapEncodeTiled(CUtensorMap *out, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  struct map map = {.address = (uint64_t)address, .type = type, .rank = rank, .swizzle = swizzle,
                    .interleave = interleave, .promotion = promotion, .fill = fill};
  if (!address || map.address % 16 || rank < 1 || rank > 5)
    return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; i++) {
    if (!sizes[i] || sizes[i] > (1ull << 32) || !box[i] || box[i] > 256)
      return CUDA_ERROR_INVALID_VALUE;
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= (1ull << 40)))
      return CUDA_ERROR_INVALID_VALUE;
    map.sizes[i] = sizes[i];
    map.box[i] = box[i];
    map.element_strides[i] = element_strides[i];
    if (i + 1 < rank)
      map.strides[i] = strides[i];
  }
  memset(out, 0, sizeof(*out));
  memcpy(out, &map, sizeof(map));
  return CUDA_SUCCESS;
}

// --- launches ---------------------------------------------------------------------------------------------------------

// Each thread has its own records: no launch of another thread is among them.
static __thread char *records = NULL;
static __thread size_t length = 0, room = 0;

static void add(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (length + 512 > room)
    records = realloc(records, room = 2 * room + 4096);
  length += vsnprintf(records + length, room - length, format, arguments);
  va_end(arguments);
}

static void add_bytes(const void *bytes, size_t count) {
  for (size_t i = 0; i < count; i++)
    add("%02x", ((const uint8_t *)bytes)[i]);
}

// One line: device, function, its name, grid, block, shared memory, stream, attributes, parameters.
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  if (!current)
    return CUDA_ERROR_INVALID_CONTEXT;
  if (!function || function->device != current->device)
    return CUDA_ERROR_INVALID_HANDLE;
  if (config->hStream && config->hStream->device != current->device)
    return CUDA_ERROR_INVALID_HANDLE;
  if ((int)config->sharedMemBytes > function->most_dynamic_shared || extra)
    return CUDA_ERROR_INVALID_VALUE;
  add("%d %lx %s", current->device, (unsigned long)function, function->name);
  add(" %u,%u,%u", config->gridDimX, config->gridDimY, config->gridDimZ);
  add(" %u,%u,%u", config->blockDimX, config->blockDimY, config->blockDimZ);
  add(" %u %lx ", config->sharedMemBytes, (unsigned long)config->hStream);
  for (unsigned i = 0; i < config->numAttrs; i++)  // of the value what Triton sets
    add("%s%d:%08x%08x", i ? "," : "", config->attrs[i].id, config->attrs[i].value.clusterDim.x,
        config->attrs[i].value.clusterDim.y);
  add(" ");
  for (int i = 0; i < function->parameters; i++) {
    add(i ? "," : "");
    add_bytes(parameters[i], function->sizes[i]);
  }
  add("\n");
  return CUDA_SUCCESS;
}

// --- for the tests ----------------------------------------------------------------------------------------------------

// The records of this thread since its last call, which are forgotten. Free them with recorder_free.
char *recorder_take(void) {
  char *taken = records ? records : strdup("");
  records = NULL;
  length = room = 0;
  return taken;
}

void recorder_free(char *taken) { free(taken); }

CUstream recorder_stream(int device) {
  CUstream stream = malloc(sizeof(*stream));
  stream->device = device;
  return stream;
}

// Loading a module takes `microseconds` longer from now on, without the interpreter's lock: other threads run then.
void recorder_delay_loads(unsigned microseconds) { load_delay = microseconds; }
