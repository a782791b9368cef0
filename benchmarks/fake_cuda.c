/* What torch asks of CUDA's runtime and driver before it computes anything: one idle H100. */
#include <stddef.h>
#include <string.h>

#define FINE(name) int name(void) { return 0; }
FINE(cudaSetDevice) FINE(cudaGetLastError) FINE(cudaPeekAtLastError) FINE(cudaDeviceSynchronize)
FINE(cudaFree) FINE(cudaEventRecord) FINE(cudaEventRecordWithFlags) FINE(cudaEventDestroy)
FINE(cudaEventQuery) FINE(cudaEventSynchronize) FINE(cudaStreamQuery) FINE(cudaStreamSynchronize)
FINE(cudaStreamWaitEvent)

#define NUMBER(name, value) int name(int *result) { *result = value; return 0; }
NUMBER(cudaGetDeviceCount, 1) NUMBER(cudaGetDevice, 0) NUMBER(cudaDeviceGetAttribute, 1)
NUMBER(cudaDriverGetVersion, 13000) NUMBER(cudaRuntimeGetVersion, 13000)

int cudaStreamIsCapturing(void *stream, int *result) { *result = 0; return 0; }
int cudaStreamGetPriority(void *stream, int *result) { *result = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = (size_t)80 << 30; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = *active = 0; }

static int handle;
int cudaStreamCreateWithPriority(void **stream) { *stream = &handle; return 0; }
int cudaEventCreateWithFlags(void **event) { *event = &handle; return 0; }

/* Offsets in struct cudaDeviceProp that CUDA 12 and 13 share. */
int cudaGetDeviceProperties(char *properties) {
  memset(properties, 0, 700);
  strcpy(properties, "fake");
  *(size_t *)(properties + 288) = (size_t)80 << 30; /* totalGlobalMem */
  *(int *)(properties + 308) = 32;                  /* warpSize */
  *(int *)(properties + 320) = 1024;                /* maxThreadsPerBlock */
  *(int *)(properties + 360) = 9;                   /* major */
  *(int *)(properties + 384) = 132;                 /* multiProcessorCount, CUDA 13 */
  *(int *)(properties + 388) = 132;                 /* multiProcessorCount, CUDA 12 */
  return 0;
}
int cudaGetDeviceProperties_v2(char *properties) { return cudaGetDeviceProperties(properties); }
