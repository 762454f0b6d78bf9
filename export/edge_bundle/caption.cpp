// Caption images on this device with ONNX Runtime's and llama.cpp's C APIs.
//
//   caption BUNDLE IMAGE.ppm…      print one caption a line
//   caption BUNDLE --check         reproduce the test vectors in BUNDLE/vectors
//
// An image is a binary PPM (P6, 8 bits), upright, in sRGB: decoding other formats is left to the device's own decoder.
// CMakeLists.txt says how to build it. Errors go to stderr; the exit code is then 1.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"
#include "onnxruntime_c_api.h"

namespace fs = std::filesystem;

static const OrtApi * ort = nullptr;

static void check(OrtStatus * status) {
    if (status) {
        std::string message = ort->GetErrorMessage(status);
        ort->ReleaseStatus(status);
        throw std::runtime_error(message);
    }
}

static std::string read_file(const fs::path & file) {
    std::ifstream stream(file, std::ios::binary);
    if (!stream) throw std::runtime_error("cannot read " + file.string());
    return {std::istreambuf_iterator<char>(stream), {}};
}

struct Image {
    int64_t height = 0, width = 0;
    std::string rgb;  // height x width x 3 bytes
};

// Read a binary PPM. Its header is "P6 width height 255" and one white space; a comment starts with #.
static Image read_ppm(const fs::path & file) {
    const std::string content = read_file(file);
    size_t at = 0;
    auto word = [&] {
        while (at < content.size() && (isspace(static_cast<unsigned char>(content[at])) || content[at] == '#')) {
            if (content[at] == '#') at = std::min(content.find('\n', at), content.size());
            else ++at;
        }
        const size_t start = at;
        while (at < content.size() && !isspace(static_cast<unsigned char>(content[at]))) ++at;
        return content.substr(start, at - start);
    };
    const std::string magic = word();
    Image image;
    image.width = std::atoll(word().c_str());
    image.height = std::atoll(word().c_str());
    const std::string max = word();
    ++at;
    const int64_t limit = 178956970;  // pixels
    if (magic != "P6" || max != "255" || image.width < 1 || image.height < 1 || image.width > limit / image.height ||
        content.size() - std::min(at, content.size()) < size_t(image.width * image.height * 3)) {
        throw std::runtime_error(file.string() + " is not a complete binary PPM (P6, 255 levels)");
    }
    image.rgb = content.substr(at, size_t(image.width * image.height * 3));
    return image;
}

struct Encoded {
    std::vector<uint8_t> crop;      // 3 x S x S
    std::vector<float> embeddings;  // queries x width
};

// encoder.onnx
class Encoder {
public:
    Encoder(const fs::path & bundle, int threads) {
        ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
        if (!ort) throw std::runtime_error("the ONNX Runtime library is older than its headers");
        OrtSessionOptions * options;
        check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "caption", &env));
        check(ort->CreateSessionOptions(&options));
        check(ort->SetIntraOpNumThreads(options, threads));
        check(ort->DisableCpuMemArena(options));  // what a large photo took is given back
        check(ort->AddSessionConfigEntry(options, "session.set_denormal_as_zero", "1"));  // tiny numbers would be slow
        check(ort->CreateSession(env, (bundle / "encoder.onnx").c_str(), options, &session));
        ort->ReleaseSessionOptions(options);
        check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    }

    ~Encoder() {
        ort->ReleaseMemoryInfo(memory);
        ort->ReleaseSession(session);
        ort->ReleaseEnv(env);
    }

    // Return a setting that the exporter wrote into the model.
    std::string setting(const char * key) const {
        OrtModelMetadata * metadata;
        OrtAllocator * allocator;
        char * value = nullptr;
        check(ort->SessionGetModelMetadata(session, &metadata));
        check(ort->GetAllocatorWithDefaultOptions(&allocator));
        check(ort->ModelMetadataLookupCustomMetadataMap(metadata, allocator, key, &value));
        ort->ReleaseModelMetadata(metadata);
        if (!value) throw std::runtime_error(std::string("encoder.onnx has no setting ") + key);
        std::string text = value;
        check(ort->AllocatorFree(allocator, value));
        return text;
    }

    Encoded encode(Image & image) {
        const int64_t shape[] = {image.height, image.width, 3};
        const char * input_names[] = {"image"};
        const char * output_names[] = {"crop", "embeddings"};
        OrtValue * input = nullptr;
        OrtValue * outputs[] = {nullptr, nullptr};
        check(ort->CreateTensorWithDataAsOrtValue(memory, image.rgb.data(), image.rgb.size(), shape, 3,
                                                  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, &input));
        check(ort->Run(session, nullptr, input_names, &input, 1, output_names, 2, outputs));
        Encoded found;
        found.crop = copy<uint8_t>(outputs[0]);
        found.embeddings = copy<float>(outputs[1]);
        ort->ReleaseValue(input);
        for (OrtValue * output : outputs) ort->ReleaseValue(output);
        return found;
    }

private:
    OrtEnv * env = nullptr;
    OrtSession * session = nullptr;
    OrtMemoryInfo * memory = nullptr;

    template <typename T> static std::vector<T> copy(OrtValue * value) {
        OrtTensorTypeAndShapeInfo * info;
        size_t count;
        void * data;
        check(ort->GetTensorTypeAndShape(value, &info));
        check(ort->GetTensorShapeElementCount(info, &count));
        ort->ReleaseTensorTypeAndShapeInfo(info);
        check(ort->GetTensorMutableData(value, &data));
        return {static_cast<T *>(data), static_cast<T *>(data) + count};
    }
};

// llm.gguf
class LanguageModel {
public:
    LanguageModel(const fs::path & bundle, const Encoder & encoder, int threads) {
        std::istringstream ends(encoder.setting("end_tokens"));
        end_tokens = {std::istream_iterator<llama_token>(ends), {}};
        max_tokens = std::stoul(encoder.setting("max_new_tokens"));
        queries = std::stoi(encoder.setting("queries"));
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        ggml_backend_load_all();
        llama_backend_init();
        model = llama_model_load_from_file((bundle / "llm.gguf").c_str(), llama_model_default_params());
        if (!model) throw std::runtime_error("llama.cpp cannot load llm.gguf");
        llama_context_params params = llama_context_default_params();
        params.n_ctx = uint32_t(queries + max_tokens);
        params.n_batch = params.n_ubatch = uint32_t(queries);
        params.n_threads = params.n_threads_batch = threads;
        context = llama_init_from_model(model, params);
        if (!context) throw std::runtime_error("llama.cpp makes no context: is there too little memory?");
        vocab = llama_model_get_vocab(model);
    }

    ~LanguageModel() {
        llama_free(context);
        llama_model_free(model);
    }

    // Return the most likely tokens after embeddings [queries, width], up to an end token.
    std::vector<llama_token> tokens(std::vector<float> embeddings) {
        if (embeddings.size() != size_t(queries) * llama_model_n_embd(model) ||
            !std::all_of(embeddings.begin(), embeddings.end(), [](float x) { return std::isfinite(x); })) {
            throw std::runtime_error("the embeddings are not finite, or not of the language model's width");
        }
        llama_memory_clear(llama_get_memory(context), true);
        llama_batch batch = {};
        batch.n_tokens = queries;
        batch.embd = embeddings.data();
        std::vector<llama_token> found;
        while (true) {
            if (int code = llama_decode(context, batch)) {
                throw std::runtime_error("llama.cpp failed with code " + std::to_string(code));
            }
            const float * logits = llama_get_logits_ith(context, -1);
            llama_token token = llama_token(std::max_element(logits, logits + llama_vocab_n_tokens(vocab)) - logits);
            if (std::count(end_tokens.begin(), end_tokens.end(), token)) return found;
            found.push_back(token);
            if (found.size() == max_tokens) return found;
            batch = llama_batch_get_one(&found.back(), 1);
        }
    }

    // Return the caption: cut at its last period, without repeated sentences.
    std::string text(const std::vector<llama_token> & tokens) const {
        std::string text(16 * tokens.size() + 16, '\0');
        int length = llama_detokenize(vocab, tokens.data(), int(tokens.size()), text.data(), int(text.size()), false, true);
        if (length < 0) {
            text.resize(size_t(-length));
            length = llama_detokenize(vocab, tokens.data(), int(tokens.size()), text.data(), -length, false, true);
        }
        text.resize(size_t(std::max(length, 0)));
        const char * spaces = " \t\n\r";
        text.erase(0, std::min(text.find_first_not_of(spaces), text.size()));
        text.erase(text.find_last_not_of(spaces) + 1);
        if (size_t period = text.rfind('.'); period != std::string::npos) text.resize(period + 1);
        std::vector<std::string> sentences;
        for (size_t start = 0, end = 1; end <= text.size(); ++end) {
            const bool last = end == text.size();
            if (!last && !(strchr(spaces, text[end]) && strchr(".!?", text[end - 1]))) continue;
            const std::string sentence = text.substr(start, end - start);
            if (!std::count(sentences.begin(), sentences.end(), sentence)) sentences.push_back(sentence);
            start = end = std::min(text.find_first_not_of(spaces, end), text.size());
        }
        std::string joined;
        for (const std::string & sentence : sentences) joined += (joined.empty() ? "" : " ") + sentence;
        return joined;
    }

private:
    llama_model * model = nullptr;
    llama_context * context = nullptr;
    const llama_vocab * vocab = nullptr;
    std::vector<llama_token> end_tokens;
    size_t max_tokens = 0;
    int queries = 0;
};

// Return the largest error of values relative to the largest of those expected.
static double relative_error(const std::vector<float> & values, const std::string & expected) {
    std::vector<float> numbers(expected.size() / sizeof(float));
    std::memcpy(numbers.data(), expected.data(), numbers.size() * sizeof(float));
    if (numbers.size() != values.size()) return INFINITY;
    double error = 0, largest = 0;
    for (size_t i = 0; i < values.size(); ++i) {
        error = std::max(error, std::fabs(double(values[i]) - numbers[i]));
        largest = std::max(largest, std::fabs(double(numbers[i])));
    }
    return error / largest;
}

// Return the largest difference between a crop 3 x S x S and an image S x S x 3, in grey levels.
static int crop_error(const std::vector<uint8_t> & crop, const Image & expected) {
    const size_t area = size_t(expected.width * expected.height);
    if (crop.size() != 3 * area) return 255;
    int error = 0;
    for (size_t i = 0; i < 3 * area; ++i) {
        error = std::max(error, std::abs(int(crop[i % 3 * area + i / 3]) - int(uint8_t(expected.rgb[i]))));
    }
    return error;
}

// Compare the results on the test vectors with those recorded; return the number of differences.
static int check_vectors(const fs::path & bundle, Encoder & encoder, LanguageModel & llm) {
    const double tolerance = std::stod(encoder.setting("tolerance"));
    int problems = 0;
    for (const auto & entry : fs::directory_iterator(bundle / "vectors")) {
        const fs::path folder = entry.path();
        Image image = read_ppm(folder / "image.ppm");
        Encoded encoded = encoder.encode(image);
        const int levels = crop_error(encoded.crop, read_ppm(folder / "crop.ppm"));
        const double error = relative_error(encoded.embeddings, read_file(folder / "embeddings.f32"));
        const std::vector<llama_token> tokens = llm.tokens(encoded.embeddings);
        std::ostringstream written;
        for (size_t i = 0; i < tokens.size(); ++i) written << (i ? " " : "") << tokens[i];
        const bool same = written.str() + "\n" == read_file(folder / "tokens.txt") &&
                          llm.text(tokens) + "\n" == read_file(folder / "caption.txt");
        std::fprintf(stderr, "%s: crop off by %d of 255, embeddings by %.1e, caption %s\n", folder.filename().c_str(), levels,
                     error, same ? "equal" : "different");
        problems += levels > 1 || !(error <= tolerance) || !same;
    }
    return problems;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        std::fprintf(stderr, "usage: caption BUNDLE IMAGE.ppm… | caption BUNDLE --check\n");
        return 2;
    }
    int problems = 0;
    try {
        const fs::path bundle = argv[1];
        const int threads = int(std::max(1u, std::thread::hardware_concurrency()));
        Encoder encoder(bundle, threads);
        LanguageModel llm(bundle, encoder, threads);
        if (std::string(argv[2]) == "--check") return check_vectors(bundle, encoder, llm) ? 1 : 0;
        for (int i = 2; i < argc; ++i) {
            try {
                Image image = read_ppm(argv[i]);
                std::cout << llm.text(llm.tokens(encoder.encode(image).embeddings)) << std::endl;
            } catch (const std::exception & error) {
                std::fprintf(stderr, "error: %s\n", error.what());
                ++problems;
            }
        }
    } catch (const std::exception & error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
    return problems ? 1 : 0;
}
