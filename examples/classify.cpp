// Classifies a picture by a package that AOTInductor compiled, without Python:
//
//     visionmix export vig_s --pretrained --format pt2 --aot --out vig_s.pt2
//     TORCH=$(python -c 'import torch; print(torch.__path__[0])')
//     c++ -std=c++20 -O2 -I$TORCH/include examples/classify.cpp -o classify \
//         -L$TORCH/lib -Wl,-rpath,$TORCH/lib,--no-as-needed -ltorch -ltorch_cpu -lc10
//     ./classify vig_s.pt2 picture.ppm
//
// The picture is a binary PPM (P6, 8 bits a colour), of any size.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

// The picture as (1, 3, height, width), from 0 to 1.
at::Tensor read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    int64_t width = 0, height = 0, most = 0;
    file >> magic >> width >> height >> most;
    TORCH_CHECK(file && magic == "P6" && most == 255, path, " is no binary PPM of 8 bits a colour");
    file.get();
    at::Tensor pixels = at::empty({height, width, 3}, at::kByte);
    TORCH_CHECK(file.read(reinterpret_cast<char*>(pixels.data_ptr()), pixels.numel()), path, " is cut off");
    return pixels.permute({2, 0, 1}).unsqueeze(0).to(at::kFloat) / 255;
}

// The numbers of the list `key` in the package's metadata.
std::vector<float> numbers(const std::string& json, const std::string& key, int count) {
    const size_t place = json.find("\"" + key + "\": [");
    TORCH_CHECK(place != std::string::npos, "the package does not say its ", key, "; write it by visionmix export");
    std::stringstream text(json.substr(place + key.size() + 5));
    std::vector<float> values(count);
    char comma;
    for (float& value : values) text >> value >> comma;
    return values;
}

int main(int count, char** arguments) try {
    TORCH_CHECK(count == 3, "give PACKAGE.pt2 PICTURE.ppm");
    torch::inductor::AOTIModelPackageLoader model(arguments[1]);
    const std::string about = model.get_metadata()["visionmix"];
    const std::vector<float> size = numbers(about, "image_size", 2);
    const at::Tensor mean = at::tensor(numbers(about, "mean", 3)).view({3, 1, 1});
    const at::Tensor deviation = at::tensor(numbers(about, "std", 3)).view({3, 1, 1});
    const std::vector<int64_t> sides(size.begin(), size.end());
    const at::Tensor image = at::_upsample_bicubic2d_aa(read_ppm(arguments[2]), sides, /*align_corners=*/false);
    const at::Tensor logits = model.run({(image.clamp(0, 1) - mean) / deviation}).at(0);
    const int64_t best = logits.argmax().item<int64_t>();
    std::cout << "class " << best << ", logit " << logits.flatten()[best].item<float>() << "\n";
} catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
    return 1;
}
