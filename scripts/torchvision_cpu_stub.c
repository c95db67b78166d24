/* Stand-in for libc10_cuda.so, used only where torch is a CPU build and torchvision a CUDA build.
 *
 * The extension modules of a CUDA torchvision are linked against torch's CUDA libraries, which a CPU torch
 * does not contain. Their CPU operators need none of it, but the dynamic loader refuses the whole module
 * while a library or a symbol is missing. This file defines exactly the symbols that torchvision's `_C.so`
 * and `image.so` import from that library, so that they load. CUDA code in them is never reached:
 * torch reports no CUDA device, and the one function that is asked first, device_count, answers 0.
 *
 * List them for another torchvision release with
 *     nm -D --undefined-only _C.so image.so | grep -E '_ZNK?(3c10|2at)4cuda'
 *
 * scripts/setup.sh compiles this file (and an empty libtorch_cuda.so).
 */

#define STUB_NAME2(line) stub_##line
#define STUB_NAME(line) STUB_NAME2(line)

/* A function under a mangled C++ name. All of them return a number, a pointer or nothing in registers. */
#define FUNCTION(symbol) \
    long STUB_NAME(__LINE__)(void) __asm__(symbol); \
    long STUB_NAME(__LINE__)(void) { return 0; }

/* An object of unknown size: only its address is taken while loading, so a zeroed block is enough. */
#define OBJECT(symbol) char STUB_NAME(__LINE__)[256] __asm__(symbol)

/* at::cuda */
FUNCTION("_ZN2at4cuda26getCurrentDevicePropertiesEv")

/* c10::cuda, devices */
FUNCTION("_ZN3c104cuda12device_countEv")
FUNCTION("_ZN3c104cuda14current_deviceEv")
FUNCTION("_ZN3c104cuda9GetDeviceEPa")
FUNCTION("_ZN3c104cuda9SetDeviceEab")
FUNCTION("_ZN3c104cuda14MaybeSetDeviceEa")
FUNCTION("_ZN3c104cuda14ExchangeDeviceEa")

/* c10::cuda, streams */
FUNCTION("_ZN3c104cuda17getStreamFromPoolEba")
FUNCTION("_ZN3c104cuda17getStreamFromPoolEia")
FUNCTION("_ZN3c104cuda20getCurrentCUDAStreamEa")
FUNCTION("_ZN3c104cuda20getDefaultCUDAStreamEa")
FUNCTION("_ZN3c104cuda20setCurrentCUDAStreamENS0_10CUDAStreamE")
FUNCTION("_ZNK3c104cuda10CUDAStream5queryEv")
FUNCTION("_ZNK3c104cuda10CUDAStream6streamEv")
FUNCTION("_ZNK3c104cuda10CUDAStream11synchronizeEv")

/* c10::cuda, error check and the caching allocator */
FUNCTION("_ZN3c104cuda29c10_cuda_check_implementationEiPKcS2_jb")
OBJECT("_ZN3c104cuda20CUDACachingAllocator9allocatorE");
